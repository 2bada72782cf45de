"""From a YAML file and overrides to a ``Config``: locations, relative paths, and every problem in one ``UserError``.

A problem is one line: ``FILE:LINE: key: found VALUE, expected WHAT; DO``. For a value given on the command line,
``command line`` stands in place of ``FILE:LINE``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qflux.config import Config
from qflux.config_errors import Place, describe, is_path_key
from qflux.config_yaml import Key, Tree, YamlProblem, key_text, parse
from qflux.errors import UserError
from qflux.io.headers import read_header
from qflux.io.secrets import redact
from qflux.old_layout import RULES, old_layout_problems

SIZE_LIMIT = 1 << 20
MODEL = ("model", "pretrained_model_name_or_path")
ADAPTER = ("model", "lora", "pretrained_weight")
_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", re.ASCII)
_MUST_EXIST = re.compile(
    r"model\.lora\.pretrained_weight|logging\.validation\.samples\[\d+\]\.(?:controls\[\d+\]|target|mask)"
)


@dataclass
class Document:
    """The merged tree of file and overrides, where each key came from, and the problems so far."""

    file: Path
    tree: Tree
    overridden: list[Key] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def place(self, key: Key) -> Place:
        """Where ``key``, or the nearest key above it, was written."""
        if any(key[: len(prefix)] == prefix for prefix in self.overridden):
            return "command line"
        known = next((key[:end] for end in range(len(key), 0, -1) if key[:end] in self.tree.lines), None)
        return f"{self.file}:{self.tree.lines[known]}" if known else str(self.file)

    def in_order(self) -> list[str]:
        """The problems by line, those of the command line last, without any secret."""
        front = re.compile(rf"{re.escape(str(self.file))}:(\d+): ")

        def rank(problem: str) -> int:
            found = front.match(problem)
            return int(found[1]) if found else SIZE_LIMIT if problem.startswith("command line") else 0

        return sorted(dict.fromkeys(redact(problem) for problem in self.problems), key=rank)

    def base(self, key: Key) -> Path:
        """Folder that a relative path at ``key`` is relative to."""
        return Path.cwd() if self.place(key) == "command line" else self.file.parent


def read_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of ``file`` with ``overrides`` applied; raises ``UserError`` with all problems."""
    document = read_document(file)
    old = old_layout_problems(document.tree, str(file))
    if old:
        raise UserError(*old)
    for override in overrides:
        _apply(document, override)
    _check_empty(document)
    _resolve_paths(document)
    config: Config | None = None
    try:
        config = Config.model_validate(document.tree.value)
    except ValidationError as error:
        document.problems += describe(error.errors(), document.tree.value, document.place)
    if document.problems or config is None:
        raise UserError(*document.in_order())
    return config


def read_document(file: Path) -> Document:
    """The file as a tree of plain values with lines; raises ``UserError`` where it is no YAML mapping."""
    try:
        tree = parse(_text(file))
    except YamlProblem as problem:
        place = f"{file}:{problem.line}" if problem.line else str(file)
        raise UserError(f"{place}: {problem}") from None
    if tree.value is None:
        raise UserError(f"{file}: the file is empty; write the sections model, data and train")
    if not isinstance(tree.value, dict):
        raise UserError(f"{file}:{tree.lines[()]}: expected sections such as `model:`, found no mapping; see configs/")
    return Document(file, tree, problems=[f"{file}:{line}: {text}" for line, text in tree.problems])


def _text(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            content = stream.read(SIZE_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "not a file name").lower()
        raise UserError(f"{str(file)!a}: {reason}; give the path of a YAML config") from None
    if len(content) > SIZE_LIMIT:
        raise UserError(f"{file}: larger than {SIZE_LIMIT} bytes; give the path of a YAML config")
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}:1: the file starts with a byte order mark; save it as UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}:{line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _apply(document: Document, override: str) -> None:
    name, equals, text = override.partition("=")
    shown = ascii(override if len(override) <= 80 else f"{override[:80]}…")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        said = f"found {shown}, expected key.path=value; write for example train.seed=1"
        document.problems.append(f"command line: {said}")
        return
    if name in RULES:
        document.problems.append(f"command line: {name} {RULES[name].text}")
        return
    try:
        tree = parse(text)
    except YamlProblem as problem:
        document.problems.append(f"command line: {shown}: {problem}")
        return
    document.problems += [f"command line: {name}: {text}" for _, text in tree.problems]
    key = tuple(name.split("."))
    parent = document.tree.value
    for depth, part in enumerate(key[:-1], 1):
        if parent.get(part) is None:
            parent[part] = {}
        parent = parent[part]
        if not isinstance(parent, dict):
            above = key_text(key[:depth])
            said = (
                f"command line: {name}: {above} is no mapping at {document.place(key[:depth])}; write {above}=... whole"
            )
            document.problems.append(said)
            return
    parent[key[-1]] = tree.value
    document.overridden.append(key)
    document.tree.empty = {path for path in document.tree.empty if path[: len(key)] != key and key[: len(path)] != path}


def _check_empty(document: Document) -> None:
    """``lora:`` with nothing behind it would silently train the whole network: ask for the word."""
    if ("model", "lora") in document.tree.empty:
        said = "model.lora: found nothing; write {} for an adapter with defaults, null to train all weights"
        document.problems.append(f"{document.place(('model', 'lora'))}: {said}")


def _resolve_paths(document: Document) -> None:
    root = document.tree.value
    if root.get("logging") is None:
        root["logging"] = {}
    if isinstance(root["logging"], dict):
        root["logging"].setdefault("output_dir", "runs")
    for value, key, replace in list(_strings(root)):
        if key == MODEL:
            replace(_model(document, value))
        elif is_path_key(key):
            resolved = _absolute(document.base(key), value)
            replace(resolved)
            if _MUST_EXIST.fullmatch(key_text(key)) and not os.path.isfile(resolved):
                said = f"{key_text(key)}: no such file: {resolved!a}; correct the path or remove the entry"
                document.problems.append(f"{document.place(key)}: {said}")
            elif key == ADAPTER:
                document.problems += [f"{document.place(key)}: {key_text(key)}: {said}" for said in _weights(resolved)]


def _weights(path: str) -> list[str]:
    """What is wrong with a file of weights, by its header."""
    try:
        read_header(path)
    except UserError as error:
        return error.problems
    return []


def _strings(node: Any, key: Key = ()) -> Iterator[tuple[str, Key, Callable[[Any], None]]]:
    """Every text leaf with its key and a function that replaces it."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node)
    for part, value in items:
        if isinstance(value, (dict, list)):
            yield from _strings(value, (*key, part))
        elif isinstance(value, str):
            yield value, (*key, part), partial(node.__setitem__, part)


def _absolute(base: Path, value: str) -> str:
    if not value:
        return value
    return os.path.normpath(os.path.join(os.path.abspath(base), os.path.expanduser(value)))


def _model(document: Document, value: str) -> str:
    beside = _absolute(document.base(MODEL), value)
    if value.startswith(("./", "../", "/", "~/")) or (value and os.path.isdir(beside)):
        return beside
    if value and not _HUB_ID.fullmatch(value):
        said = f"found {value[:80]!a}, expected a hub id (OWNER/NAME) or a folder; there is no folder {beside!a}"
        document.problems.append(f"{document.place(MODEL)}: {key_text(MODEL)}: {said}; correct it")
    return value
