"""YAML text to plain trees with line numbers, and back: the core types of YAML 1.2, and nothing that runs or refers.

``1e-4`` is a number, ``yes``, ``no``, ``on`` and ``off`` are text. Duplicate keys, anchors, aliases, tags and several
documents in one file are refused with their line. ``parse`` builds values from the node graph itself: no constructor of
PyYAML runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from qflux.io.secrets import ADVICE, secret_in

Key = tuple[str | int, ...]
DEPTH_LIMIT = 20
_CORE = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}


class YamlProblem(Exception):
    """Text that is no acceptable YAML: the line (from 1; None = the whole text) and what is wrong with it."""

    def __init__(self, line: int | None, text: str) -> None:
        self.line = line
        super().__init__(text)


@dataclass
class Tree:
    """A parsed text: value, line of every key path, paths left empty, problems that did not stop the parsing.

    suspect  whether keys and values are searched for secrets
    """

    value: Any = None
    lines: dict[Key, int] = field(default_factory=dict)
    empty: set[Key] = field(default_factory=set)
    problems: list[tuple[int, str]] = field(default_factory=list)
    suspect: bool = True


class _Reader(yaml.SafeLoader):
    """Composes nodes with the core schema's resolvers; refuses references and tags on the way."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute, copied on write)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise YamlProblem(line, "anchors (&name) and aliases (*name) are not read; write the value out")
        if event.tag is not None:
            raise YamlProblem(line, f"tags such as {event.tag[:40]!a} are not read; write the plain value")
        if self.depth >= DEPTH_LIMIT:
            raise YamlProblem(line, f"nested more than {DEPTH_LIMIT} levels deep; no key of a config is")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Writer(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or the core schema would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> Any:
        numbers = all(isinstance(item, (int, float)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=numbers)


def _add_resolvers() -> None:
    for name, (pattern, first) in _CORE.items():
        whole = re.compile(rf"(?:{pattern.pattern})\Z")
        yaml.add_implicit_resolver(f"tag:yaml.org,2002:{name}", whole, first, Loader=_Reader, Dumper=_Writer)


_add_resolvers()
_Writer.add_representer(list, _Writer.represent_list)


def parse(text: str) -> Tree:
    """The tree of a YAML text; raises ``YamlProblem`` where it cannot be read at all."""
    try:
        reader = _Reader(text)
        node = reader.get_single_node()  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlProblem(mark.line + 1 if mark else None, f"not valid YAML: {' '.join(said.split())}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlProblem(line, f"not valid YAML: character U+{error.character:04X} is not allowed") from None
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError):
        raise YamlProblem(None, "not valid YAML: an escape or a number in it is out of range") from None
    # one look at the whole text: value by value takes as long as the parsing; only an escape could hide a secret here
    tree = Tree(suspect="\\" in text or secret_in(text) is not None)
    if node is not None:
        tree.lines[()] = node.start_mark.line + 1
        tree.value = _value(node, (), tree)
    return tree


def _value(node: yaml.Node, path: Key, tree: Tree) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, tree)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            tree.lines[*path, index] = item.start_mark.line + 1
        return [_value(item, (*path, index), tree) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None:
        tree.empty.add(path)
    return _scalar(node, tree)


def _mapping(node: yaml.MappingNode, path: Key, tree: Tree) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            tree.problems.append((line, "a key is a list or a mapping; keys are plain words"))
            continue
        key = key_node.value
        _refuse_secret("the key", key, key_node, tree)
        here = (*path, key)
        if key in result:
            tree.problems.append((line, f"{key_text(here)}: written twice, first in line {tree.lines[here]}; keep one"))
            continue
        tree.lines[here] = line
        result[key] = _value(value_node, here, tree)
    return result


def _scalar(node: yaml.Node, tree: Tree) -> Any:
    text = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        return _number(text, kind)
    wrong = next((char for char in text if char == "\0" or "\ud800" <= char <= "\udfff"), None)
    if wrong is not None:
        tree.problems.append((node.start_mark.line + 1, f"the text holds the character U+{ord(wrong):04X}; remove it"))
    _refuse_secret("the value", text, node, tree)
    return text


def _refuse_secret(what: str, text: str, node: yaml.Node, tree: Tree) -> None:
    """A config is copied into each run's folder and shared with its result: no token may get that far."""
    found = secret_in(text) if tree.suspect else None
    if found is not None:
        tree.problems.append((node.start_mark.line + 1, f"{what} {found}; {ADVICE}"))


def _number(text: str, kind: str) -> int | float | str:
    if kind == "float":
        word = text.lower()
        return float(word.replace(".", "") if word.endswith(("inf", "nan")) else word)
    if len(text) > 40:  # no key takes such a number; as text it is reported with its key
        return text
    sign, digits = (text[0], text[1:]) if text[0] in "+-" else ("", text)
    base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
    return int(sign + digits[2:] if base != 10 else sign + digits, base)


def write_yaml(value: Any) -> str:
    """Block-style YAML of a tree of dicts, lists and scalars, in the order of its keys; number lists in one line."""
    text: str = yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=1000)
    return text


def key_text(path: Key) -> str:
    """``("data", "dataset_path", 0, "path")`` as ``data.dataset_path[0].path``; odd keys are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = part if re.fullmatch(r"[\w-]{1,60}", part) else ascii(part[:60])
            text += f".{word}" if text else word
    return text
