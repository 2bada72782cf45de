"""Config files and overrides that nobody would write, each with what it means.

A ``Case`` knows by itself, without the reader under test, what a YAML text means and which of its keys the JSON schema
refuses. Every key of the schema is written, with values at and beyond its limits, of other types, and in odd spellings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from faults.config_words import (
    FORBIDDEN,
    MALFORMED,
    REFUSED,
    SPECIAL,
    UNKNOWN,
    UNREADABLE,
    WORDS,
    Written,
)

from qflux.config import config_schema
from qflux.config_yaml import key_text
from qflux.old_layout import RULES

SCHEMA = config_schema()
BYTES = 80  # of which a case is made; where they end, choices are the first ones
Key = tuple[str, ...]
Node = dict[str, Any]  # names to nodes or to what was written


def quoted(text: str) -> str:
    """A text between YAML's double quotes."""
    return json.dumps(text, ensure_ascii=False)


def branches(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a schema, references followed."""
    if "$ref" in schema:
        yield from branches(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from branches(option)
    else:
        yield schema


def _sections(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [option for option in branches(schema) if "properties" in option]


def _walk(schema: Mapping[str, Any], key: Key = (), listed: bool = False) -> Iterator[tuple[Key, Any, bool]]:
    """(key, schema, whether it lies in a list) of every key."""
    for option in branches(schema):
        if "items" in option:
            yield from _walk(option["items"], key, listed=True)
        for name, below in option.get("properties", {}).items():
            yield (*key, name), below, listed
            yield from _walk(below, (*key, name), listed)


KEYS: dict[Key, Any] = {}
LISTED: dict[Key, Any] = {}
for _key, _schema, _listed in _walk(SCHEMA):
    (LISTED if _listed else KEYS).setdefault(_key, _schema)
LISTS = sorted({key[:-1] for key in LISTED})


def accepted(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether the JSON schema takes a value; numbers are finite, 1.0 is no whole number, null is an empty section."""
    return any(_fits(option, value) for option in branches(schema))


def _fits(option: Mapping[str, Any], value: Any) -> bool:
    kind = option.get("type")
    if "enum" in option:
        return value in option["enum"] and isinstance(value, str)
    if kind in ("integer", "number"):
        types = int if kind == "integer" else int | float
        return (
            isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value) and _inside(option, value)
        )
    if kind == "array":
        return isinstance(value, list) and _fits_list(option, value)
    if kind == "object" and "properties" in option:
        return isinstance(value, dict) and all(
            name in option["properties"] and accepted(option["properties"][name], below)
            for name, below in value.items()
        )
    if kind == "object":
        return isinstance(value, dict) and all(
            accepted(option["additionalProperties"], item) for item in value.values()
        )
    if kind == "string":
        return isinstance(value, str) and len(value) >= option.get("minLength", 0)
    return (kind == "boolean" and isinstance(value, bool)) or (kind == "null" and value is None)


def _inside(option: Mapping[str, Any], value: float) -> bool:
    low, above = option.get("minimum", -math.inf), option.get("exclusiveMinimum", -math.inf)
    high, below = option.get("maximum", math.inf), option.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)


def _fits_list(option: Mapping[str, Any], value: Sequence[Any]) -> bool:
    if not option.get("minItems", 0) <= len(value) <= option.get("maxItems", math.inf):
        return False
    inside = option.get("prefixItems") or [option["items"]] * len(value)
    return all(accepted(schema, item) for schema, item in zip(inside, value, strict=True))


def wrong_keys(tree: Mapping[str, Any], schema: Mapping[str, Any] = SCHEMA, key: Key = ()) -> Iterator[Key]:
    """Keys of a tree that the schema does not know, or whose value it refuses."""
    properties = {name: below for option in _sections(schema) for name, below in option["properties"].items()}
    for name, value in tree.items():
        here = (*key, name)
        if name not in properties:
            yield here
        elif value is REFUSED:
            continue
        elif isinstance(value, dict) and _sections(properties[name]):
            yield from wrong_keys(value, properties[name], here)
        elif not accepted(properties[name], value) and not (value is None and _sections(properties[name])):
            yield here


def sound(schema: Mapping[str, Any], key: str = "") -> list[Written]:
    """Values that the schema takes, at their limits where there are some."""
    found: list[Written] = list(SPECIAL.get(key, ()))
    if key in ("logging.validation.samples.target", "logging.validation.samples.mask", "model.lora.pretrained_weight"):
        return found
    for option in branches(schema):
        kind = option.get("type")
        if "enum" in option:
            found += [(word, word) for word in option["enum"]]
        elif kind == "boolean":
            found += [("true", True), ("false", False)]
        elif kind in ("integer", "number"):
            numbers = [0, 1, 2, 7, 1000, option.get("minimum", 1), option.get("maximum", 3)]
            numbers += [0.5, 1e-3, 0.999] if kind == "number" else []
            found += [(repr(number), number) for number in numbers if _inside(option, number)]
        elif kind == "null":
            found += [("null", None)]
        elif kind == "array":
            found += _sound_lists(option)
        elif kind == "string":
            found += [("word", "word"), ("a/b.png", "a/b.png"), ('"two words"', "two words"), ("'x'", "x")]
        else:
            found += [("{}", {})]
    return found


def _sound_lists(option: Mapping[str, Any]) -> list[Written]:
    if "prefixItems" in option:
        pairs = [[sound(item)[at % len(sound(item))] for item in option["prefixItems"]] for at in (0, 1, 2)]
    else:
        pairs = [[item] for item in sound(option["items"])[:3]] + [sound(option["items"])[1:3]]
    return [(f"[{', '.join(text for text, _ in pair)}]", [value for _, value in pair]) for pair in pairs]


def candidates(key: Key, schema: Mapping[str, Any]) -> list[Written]:
    """What may be written at a key: two in three are sound."""
    good = sound(schema, key_text(key))
    wrong = [word for word in WORDS if not (word[0] == "" and key == ("model", "lora"))]
    wrong += [(text, REFUSED) for text in FORBIDDEN]
    return good * max(1, round(2 * len(wrong) / len(good))) + wrong


CHOICES = {key: candidates(key, schema) for key, schema in {**KEYS, **LISTED}.items()}
SOUND = {key: sound(schema, key_text(key)) for key, schema in KEYS.items()}
PLAIN, PARENTS = list(KEYS), sorted({key[:-1] for key in KEYS})
REQUIRED: dict[Key, Written] = {
    ("model", "pretrained_model_name_or_path"): ("owner/name", "owner/name"),
    ("data", "dataset_path"): ("pairs", "pairs"),
    ("train", "trainer"): ("Any", "Any"),
}


@dataclass
class Case:
    """A file, overrides, and what they say: ``tree``; ``must_refuse`` where no config may come of it."""

    text: bytes
    overrides: tuple[str, ...] = ()
    tree: dict[str, Any] | None = None  # None = not known
    must_refuse: bool = False
    readable: bool = True  # whether it can be read to its end, so that all problems are to be named
    strange: bool = False  # whether it holds characters that YAML refuses or reads as others


def place(node: Node, key: Key, written: Any) -> None:
    """Write at a key; what stands in the way of it is replaced."""
    for name in key[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    node[key[-1]] = written


def block(node: Node, indent: str = "") -> Iterator[str]:
    """Lines of block-style YAML."""
    for name, below in node.items():
        shown = name if re.fullmatch(r"[A-Za-z_]+", name) else quoted(name)
        if isinstance(below, dict) and below:
            yield f"{indent}{shown}:"
            yield from block(below, indent + "  ")
        else:
            yield f"{indent}{shown}: {'{}' if isinstance(below, dict) else below[0]}".rstrip(" ")


def meaning(node: Any) -> Any:
    """The plain tree of a node."""
    if isinstance(node, dict):
        return {name: meaning(below) for name, below in node.items()}
    return deepcopy(node[1])


def holds_refused(tree: Any) -> bool:
    """Whether a value that no config may hold is in a tree."""
    if isinstance(tree, dict | list):
        return any(holds_refused(item) for item in (tree.values() if isinstance(tree, dict) else tree))
    return tree is REFUSED


class Dice:
    """Choices out of bytes, so that one draw makes a whole case; where they end, every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        self.at += 2
        return int.from_bytes(self.data[self.at - 2 : self.at], "big") % count

    def of(self, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return choices[self.below(len(choices))]


def _section_list(dice: Dice) -> tuple[Key, Written]:
    """A list of sections such as data.dataset_path, in flow style."""
    key = dice.of(LISTS)
    texts, values = [], []
    for _ in range(1 + dice.below(2)):
        entry = {}
        for _ in range(1 + dice.below(3)):
            name = dice.of([below for below in LISTED if below[:-1] == key])
            entry[name[-1]] = dice.of(CHOICES[name])
        texts.append("{" + ", ".join(f"{name}: {text}" for name, (text, _) in entry.items()) + "}")
        values.append({name: value for name, (_, value) in entry.items()})
    return key, (f"[{', '.join(texts)}]", REFUSED if holds_refused(values) else values)


def _free(dice: Dice) -> tuple[Key, Written]:
    """A text of any characters."""
    text = "".join(
        chr(dice.below(1 << dice.of((7, 8, 16, 16))) + dice.of((0, 0, 1 << 16))) for _ in range(dice.below(9))
    )
    return dice.of(PLAIN), (quoted(text), text)


def setting(dice: Dice, calm: bool, plain: bool = False) -> tuple[Key, Written]:
    """A key and what is written there; ``calm`` ones are sound by themselves, ``plain`` keys are words."""
    key = dice.of(PLAIN)
    if calm:
        return key, dice.of(SOUND[key])
    kind = dice.below(16)
    if kind == 1:
        return _section_list(dice)
    if kind == 2:
        names = [name for name in UNKNOWN if re.fullmatch(r"[\w-]+", name)] if plain else UNKNOWN
        return (*dice.of(PARENTS), dice.of(names)), dice.of(WORDS)
    return _free(dice) if kind == 3 else (key, dice.of(CHOICES[key]))


def file_case(dice: Dice) -> Case:
    """A file of some settings beside the required ones, of which one in twelve files lacks one."""
    node: Node = {}
    lacking, calm = dice.below(36), dice.below(2) == 0
    for at, (key, written) in enumerate(REQUIRED.items(), 1):
        if at != lacking:
            place(node, key, written)
    for _ in range(dice.below(7 if calm else 5)):
        place(node, *setting(dice, calm))
    tree = meaning(node)
    text = "\n".join(block(node)) + "\n"
    wrong = holds_refused(tree)
    return Case(text.encode("utf-8", "surrogatepass"), (), tree, wrong, not wrong, bool(UNREADABLE.search(text)))


def override_case(dice: Dice) -> Case:
    """Settings on the command line over those of a file."""
    case = file_case(dice)
    words = []
    for _ in range(1 + dice.below(3)):
        key, (text, value) = setting(dice, calm=dice.below(2) == 0, plain=True)
        words.append(f"{'.'.join(key)}={text}")
        _override(case, key, value)
        wrong = holds_refused([value])
        case.readable &= not wrong
        case.must_refuse |= wrong or (text == "" and key == ("model", "lora"))
        case.strange |= bool(UNREADABLE.search(text))
    if dice.below(20) == 1:
        words.append(dice.of(MALFORMED))
        case.must_refuse = True
    case.overrides = tuple(words)
    return case


def _override(case: Case, key: Key, value: Any) -> None:
    node: Any = case.tree
    case.must_refuse |= ".".join(key) in RULES
    for name in key[:-1]:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            case.must_refuse, case.readable = True, False
            return
    node[key[-1]] = deepcopy(value)


def _utf(text: bytes, encoding: str) -> bytes:
    return text.decode("utf-8", "replace").encode(encoding)


REFUSED_TEXTS: list[Callable[[bytes], bytes]] = [
    lambda text: b"",
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: _utf(text, "utf-16"),
    lambda text: _utf(text, "utf-32"),
    lambda text: text.replace(b"\n  ", b"\n\t"),
    lambda text: b"---\n" + text + b"---\n" + text,
    lambda text: b"# " + text.replace(b"\n", b"\n# "),
    lambda text: b"- " + text.replace(b"\n", b"\n  "),
    lambda text: b"&top\n" + text,
    lambda text: text + b"\xc3\x28\n",
    lambda text: text + b"\x00",
    lambda text: text + b"train: {}\ntrain: {}\n",
    lambda text: text + b"<<: {train: {seed: 1}}\n",
    lambda text: b"%TAG ! tag:x,2000:\n---\n" + text + b"data: !y {}\n",
    lambda text: quoted(_utf(text, "utf-8").decode()).encode(),
    lambda text: text + b"# " + b"x" * (1 << 20),
]
SAME_TEXTS: list[Callable[[bytes], bytes]] = [
    lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: text.replace(b"\n", b"\r"),
    lambda text: b"---\n" + text + b"...\n",
    lambda text: b"# first\n" + text.replace(b"\n", b"  # said\n\n"),
    lambda text: b"\n \n" + text.replace(b"\n  ", b"\n     "),
    lambda text: text.rstrip(b"\n"),
]


def hurt_case(dice: Dice) -> Case:
    """A file that is damaged, in a way that must be noticed or by other bytes in its middle; or one of any bytes."""
    if dice.below(8) == 1:
        return Case(bytes(dice.below(256) for _ in range(dice.below(BYTES // 2))))
    text = file_case(dice).text
    if dice.below(3) == 0:
        return Case(dice.of(REFUSED_TEXTS)(text), must_refuse=True)
    at, put = dice.below(len(text) + 1), bytes(dice.below(256) for _ in range(dice.below(5)))
    end = len(text) if dice.below(4) == 1 else at + dice.below(4)
    return Case(text[:at] + put + text[end:])


def other_spelling(dice: Dice) -> tuple[Case, Case]:
    """A file, and the same file in another spelling."""
    case = file_case(dice)
    return case, Case(dice.of(SAME_TEXTS)(case.text))
