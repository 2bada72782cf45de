"""Validation errors as lines for people: what was found, what was expected, which key was meant.

All knowledge of keys comes from the JSON schema of the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from qflux.config import Config
from qflux.config_yaml import Key, key_text
from qflux.io.secrets import ADVICE, is_secret_name

Place = str
Schema = Mapping[str, Any]
_WORDS = {"boolean": "true or false", "null": "null", "object": "a mapping", "string": "text"}


@lru_cache(maxsize=1)
def _root() -> Schema:
    return Config.model_json_schema()


def _branches(schema: Schema) -> Iterator[Schema]:
    """The alternatives of a schema with references followed."""
    if "$ref" in schema:
        yield from _branches(_root()["$defs"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from _branches(option)
    else:
        yield schema


@lru_cache(maxsize=4096)
def _at(key: Key) -> tuple[Schema, ...]:
    """The schemas a key path may lead to (none for an unknown key); an index leads into a list."""
    found: list[Schema] = [_root()]
    for part in key:
        options = [option for schema in found for option in _branches(schema)]
        if isinstance(part, int):
            found = [option["items"] for option in options if "items" in option]
            found += [option["prefixItems"][part] for option in options if part < len(option.get("prefixItems", ()))]
        else:
            found = [option["properties"][part] for option in options if part in option.get("properties", {})]
    return tuple(found)


def _leaves(key: Key) -> list[Schema]:
    return [option for schema in _at(key) for option in _branches(schema)]


def is_known(key: Key) -> bool:
    """Whether ``key`` is a key of the schema."""
    return bool(_at(key))


def is_path_key(key: Key) -> bool:
    """Whether the value at ``key`` is a path of the file system."""
    return any(option.get("format") == "path" for option in _leaves(key))


def allowed_keys(key: Key) -> list[str]:
    """Names allowed below ``key``, in the order of the schema."""
    return [name for option in _leaves(key) for name in option.get("properties", {})]


@lru_cache(maxsize=1)
def all_keys() -> tuple[Key, ...]:
    """Every key path of the schema, without list indices."""
    found: list[Key] = []

    def walk(schema: Schema, key: Key) -> None:
        for option in _branches(schema):
            if "items" in option:
                walk(option["items"], key)
            for name, below in option.get("properties", {}).items():
                found.append((*key, name))
                walk(below, (*key, name))

    walk(_root(), ())
    return tuple(dict.fromkeys(found))


def edit_distance(left: str, right: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours from one word to the other."""
    rows = [list(range(len(right) + 1))]
    for i, char in enumerate(left, 1):
        row = [i]
        for j, other in enumerate(right, 1):
            cost = min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (char != other))
            if i > 1 and j > 1 and char == right[j - 2] and left[i - 2] == other:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def _bare(word: str) -> str:
    return word.lower().replace("-", "_")


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate that ``word`` most likely stands for, or None; one edit in three letters is too far."""
    word = _bare(word[:60])
    scored = [(edit_distance(word, _bare(name)), position, name) for position, name in enumerate(candidates)]
    close = [entry for entry in scored if entry[0] <= max(1, min(len(word), len(entry[2])) // 3)]
    return min(close)[2] if close else None


def suggest(key: Key) -> str | None:
    """The known key that an unknown one most likely stands for: a sister first, then the same name elsewhere."""
    name, parent = str(key[-1]), key[:-1]
    sister = nearest(name, allowed_keys(parent))
    if sister is not None:
        return key_text((*parent, sister))
    elsewhere = [known for known in all_keys() if known[-1] == name]
    if not elsewhere and len(name) > 4:
        close = nearest(name, [str(known[-1]) for known in all_keys()])
        elsewhere = [known for known in all_keys() if known[-1] == close]
    return key_text(min(elsewhere, key=len)) if elsewhere else None


def show(value: Any) -> str:
    """A value in one short line."""
    if isinstance(value, Mapping):
        return "a mapping"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _range(option: Schema) -> str:
    bounds = [
        (name, text)
        for name, text in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if name in option
    ]
    said = " and ".join(f"{text} {option[name]:.15g}" for name, text in bounds)
    return f" {said}" if said else ""


def _expected(key: Key) -> str:
    said = []
    for option in _leaves(key):
        kind = option.get("type")
        if "enum" in option:
            said.append(" or ".join([", ".join(option["enum"][:-1]), option["enum"][-1]]).removeprefix(" or "))
        elif kind in ("integer", "number"):
            said.append(("a whole number" if kind == "integer" else "a number") + _range(option))
        elif kind == "array":
            size = option.get("minItems")
            said.append(f"a list of {size}" if size and size == option.get("maxItems") else "a list")
        elif option.get("format") == "path":
            said.append("a path")
        else:
            said.append(_WORDS.get(str(kind), "another value"))
    return " or ".join(dict.fromkeys(said)) or "another value"


def _meant(key: Key, value: Any) -> str | None:
    choices = [name for option in _leaves(key) for name in option.get("enum", [])]
    close = nearest(value, choices) if isinstance(value, str) else None
    return f"did you mean {close}?" if close else None


def _advice(key: Key, value: Any) -> str:
    meant = _meant(key, value)
    if meant:
        return meant
    defaults = [schema["default"] for schema in _at(key) if "default" in schema]
    return f"the default is {show(defaults[0])}" if defaults else "correct the value"


def _follow(location: Sequence[str | int], tree: Any, known: bool) -> tuple[Key, Any]:
    """The written key and value that an error's location names; parts that normalising added are skipped.

    ``known`` is False for a last part that need not be in the tree.
    """
    key: Key = ()
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            key, tree = (*key, part), tree[part]
        elif isinstance(tree, Mapping) and isinstance(part, str) and (part in tree or (last and not known)):
            key, tree = (*key, part), tree.get(part)
        elif (tree is None or isinstance(tree, Mapping)) and isinstance(part, str) and is_known((*key, part)):
            key, tree = (*key, part), {}
    return key, tree


def written_key(error: Any, tree: Any) -> Key:
    """The key of ``tree`` that one of pydantic's errors is about."""
    key, _ = _follow(error["loc"], tree, known=error["type"] != "missing")
    return (*key, error["ctx"]["key"]) if "key" in error.get("ctx", {}) else key


def describe(errors: Sequence[Any], tree: Any, place: Callable[[Key], Place]) -> list[str]:
    """One line for each problem of ``errors`` (pydantic's), in the order of the schema, at most one for each key."""
    lines: dict[Key, str] = {}
    meant: set[str] = set()
    for error in errors:
        if error["type"] == "extra_forbidden":
            key, _ = _follow(error["loc"], tree, known=False)
            guess = suggest(key)
            meant |= {guess} if guess else set()
            lines[key] = f"{place(key)}: {key_text(key)}: {_unknown(key, guess)}"
    for error in errors:
        if error["type"] == "extra_forbidden":
            continue
        key, value = _follow(error["loc"], tree, known=error["type"] != "missing")
        if error["type"] == "missing" and isinstance(error["loc"][-1], str):
            if key_text(key) not in meant:  # its misspelt form has a line already
                lines.setdefault(key, f"{place(key)}: {key_text(key)}: missing; {_how_to_write(key)}")
            continue
        if "key" in error.get("ctx", {}):
            key, value = (*key, error["ctx"]["key"]), value.get(error["ctx"]["key"])
        lines.setdefault(key, f"{place(key)}: {key_text(key)}: found {show(value)}, {_wrong(error, key, value)}")
    return list(lines.values())


def _unknown(key: Key, guess: str | None) -> str:
    if is_secret_name(str(key[-1])):
        return f"unknown key; no key takes a secret: {ADVICE}"
    parent = key[:-1]
    allowed = ", ".join(allowed_keys(parent))
    question = f"did you mean {guess}?" if guess else "remove it"
    return f"unknown key; {question} ({key_text(parent) or 'the file'} allows: {allowed})"


def _how_to_write(key: Key) -> str:
    described = next((schema["description"] for schema in _at(key) if "description" in schema), _expected(key))
    return f"write `{key[-1]}: ...` ({described})"


def _wrong(error: Any, key: Key, value: Any) -> str:
    if error["type"] in ("value_error", "below"):
        said, meant = str(error.get("ctx", {}).get("error") or error["ctx"]["text"]), _meant(key, value)
        return f"{said}; {meant}" if meant else said
    return f"expected {_expected(key)}; {_advice(key, value)}"
