"""Rewrite a config of an earlier layout: ``python -m qflux.migrate OLD.yaml [-o NEW.yaml]``.

What has a place in the current layout is moved there; what has none is named in a comment of the new file, with the
reason. An existing file is never overwritten.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qflux.config import Config, load_config
from qflux.config_errors import describe, is_path_key, written_key
from qflux.config_file import read_document
from qflux.config_yaml import Key, key_text, write_yaml
from qflux.errors import DONE, USER, QfluxError, UserError
from qflux.io import atomic
from qflux.old_layout import OLD_MODULES, Rule, old_keys

SIDE_LIMIT = 1 << 14  # a larger number among old resolutions is an area
OLD_VALIDATION_STEPS = 200  # what an old file that only says "enabled" meant
_SWITCHES = ("enabled", "enable")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adamw",
    "adamw8bit": "adamw8bit",
    "adam8bit": "adamw8bit",
    "prodigy": "prodigy",
    "adafactor": "adafactor",
    "adamwschedulefree": "adamw_schedule_free",
}


class _Gone(Exception):
    """An old value that has no counterpart; the text says why."""


@dataclass
class Migration:
    """The new tree, and what was moved and dropped on the way: ``(old key, new key)`` and ``(old key, reason)``."""

    old: dict[str, Any]
    tree: dict[str, Any] = field(default_factory=dict)
    moved: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The value at a dotted key of the new tree, or None."""
        node: Any = self.tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def put(self, key: Sequence[str | int], value: Any) -> None:
        """Set a key of the new tree."""
        node = self.tree
        for part in key[:-1]:
            if not isinstance(node.get(str(part)), dict):
                node[str(part)] = {}
            node = node[str(part)]
        node[str(key[-1])] = value


def migrate(old: dict[str, Any]) -> Migration:
    """Move every key of an old tree to its place; the result's tree is valid but for missing keys."""
    result = Migration(_without_references(old, old))
    found = list(old_keys(result.old))
    # keys that are already in place first: an alias of an older layout never overrides them
    for key, value, rule in sorted(found, key=lambda entry: _rank(entry[2])):
        name = key_text(key)
        try:
            if rule is None:
                result.put(key, value)
            elif rule.new is None:
                result.dropped.append((name, rule.why))
            else:
                converted = _CONVERT[rule.convert](value, rule, result)
                result.put(rule.new.split("."), converted)
                result.moved.append((name, rule.new))
        except _Gone as gone:
            result.dropped.append((name, str(gone)))
    _drop_refused(result)
    return result


def _rank(rule: Rule | None) -> int:
    late = ("unless_set", "enabled", "loss_class")
    return 0 if rule is None else 2 if rule.convert in late else 1


def _without_references(value: Any, root: dict[str, Any], depth: int = 0) -> Any:
    """``${a.b}`` is replaced by the value it names, old module names by the new ones."""
    if isinstance(value, dict):
        return {key: _without_references(below, root, depth) for key, below in value.items()}
    if isinstance(value, list):
        return [_without_references(below, root, depth) for below in value]
    if not isinstance(value, str):
        return value
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value)
    if reference and depth < 8:
        node: Any = root
        for part in reference[1].split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return value if node is None else _without_references(node, root, depth + 1)
    for old, new in OLD_MODULES.items():
        value = value.replace(old, new)
    return value


def _drop_refused(result: Migration) -> None:
    """Remove values this version refuses, with its reason; what is missing stays missing."""
    for _ in range(3):
        try:
            Config.model_validate(result.tree)
            return
        except ValidationError as error:
            refused = [problem for problem in error.errors() if problem["type"] != "missing"]
        for problem in refused:
            line = describe([problem], result.tree, lambda key: "")[0]
            if _remove(result.tree, written_key(problem, result.tree)):
                result.dropped.append(tuple(line.removeprefix(": ").split(": ", 1)))  # type: ignore[arg-type]


def _remove(tree: Any, key: Key) -> bool:
    for part in key[:-1]:
        tree = tree.get(part) if isinstance(tree, dict) else None
        if isinstance(tree, list):
            return False
    return isinstance(tree, dict) and tree.pop(key[-1], _Gone) is not _Gone


def _unless_set(value: Any, rule: Rule, result: Migration) -> Any:
    if result.get(rule.new or "") is not None:
        raise _Gone(f"{rule.new} is given")
    return value


def _dataset(value: Any, rule: Rule, result: Migration) -> Any:
    items = value if isinstance(value, list) else [value]
    return [
        {"repo_id": item} if isinstance(item, str) and _HUB_ID.fullmatch(item) and not os.path.exists(item) else item
        for item in items
    ]


def _resolutions(value: Any, rule: Rule, result: Migration) -> Any:
    if isinstance(value, Mapping):
        result.dropped.append(("multi_resolutions.controls", "controls follow the target's choice"))
        value = value.get("target")
    if not isinstance(value, list):
        raise _Gone("it was no list")
    return [math.isqrt(item) if isinstance(item, int) and item > SIDE_LIMIT else item for item in value]


def _optimizer_class(value: Any, rule: Rule, result: Migration) -> Any:
    word = str(value).rpartition(".")[2].lower()
    if word not in _OPTIMIZERS:
        raise _Gone(f"{value!a} is no optimizer of this version")
    if word in ("adam", "adam8bit") and result.get("train.optimizer.weight_decay") is None:
        result.put(("train", "optimizer", "weight_decay"), 0.0)  # plain Adam had none
    return _OPTIMIZERS[word]


def _loss_class(value: Any, rule: Rule, result: Migration) -> Any:
    if result.get("train.loss.mask_loss") is not None:
        raise _Gone("train.loss.mask_loss is given")
    return "mask" in str(value).lower()


def _validation_is_off(result: Migration) -> bool:
    logging = result.old.get("logging")
    sections = [result.old.get("validation"), logging.get("sampling") if isinstance(logging, dict) else None]
    return any(section.get(key) is False for section in sections if isinstance(section, dict) for key in _SWITCHES)


def _enabled(value: Any, rule: Rule, result: Migration) -> Any:
    return None if value is False else result.get("logging.validation.steps") or OLD_VALIDATION_STEPS


def _validation_steps(value: Any, rule: Rule, result: Migration) -> Any:
    return None if _validation_is_off(result) else value


def _samples(value: Any, rule: Rule, result: Migration) -> Any:
    if not isinstance(value, list):
        raise _Gone("it was no list")
    samples = []
    for sample in (entry for entry in value if isinstance(entry, dict)):
        new = {"prompt": sample.get("prompt") or "", "controls": sample.get("images") or sample.get("controls") or []}
        new["controls"] = [new["controls"]] if isinstance(new["controls"], str) else new["controls"]
        if sample.get("height") and sample.get("width"):
            new["size"] = [sample["height"], sample["width"]]
        samples.append(new)
        for name in sorted(set(sample) - {"prompt", "images", "controls", "height", "width"}):
            result.dropped.append((f"validation.samples.{name}", "a sample has no such key"))
    return samples


_CONVERT: dict[str, Callable[[Any, Rule, Migration], Any]] = {
    "copy": lambda value, rule, result: value,
    "unless_set": _unless_set,
    "dataset": _dataset,
    "resolutions": _resolutions,
    "optimizer_class": _optimizer_class,
    "loss_class": _loss_class,
    "enabled": _enabled,
    "validation_steps": _validation_steps,
    "samples": _samples,
}


def _rebase(node: Any, old: Path, new: Path, key: Key = ()) -> Any:
    """Relative paths that exist beside the old file or in the working directory, written relative to the new file."""
    if isinstance(node, dict):
        return {name: _rebase(below, old, new, (*key, name)) for name, below in node.items()}
    if isinstance(node, list):
        return [_rebase(below, old, new, (*key, index)) for index, below in enumerate(node)]
    if not isinstance(node, str) or os.path.isabs(node):
        return node
    if not is_path_key(key) and key != ("model", "pretrained_model_name_or_path"):
        return node
    base = next((folder for folder in (old.parent, Path.cwd()) if node and os.path.exists(folder / node)), None)
    return node if base is None else os.path.relpath(base / node, new.parent)


def migrated_text(old: Path, new: Path) -> tuple[str, Migration]:
    """The text of the new file and what happened to each key; raises ``UserError`` if ``old`` is in no old layout."""
    document = read_document(old)
    if document.problems:
        raise UserError(*document.problems)
    if all(rule is None for _, _, rule in old_keys(document.tree.value)):
        raise UserError(f"{old}: no key of an earlier layout in it; use it as it is")
    result = migrate(document.tree.value)
    order = [name for name in Config.model_fields if name in result.tree]
    tree = _rebase({name: result.tree[name] for name in order}, old, new)
    head = [f"# Rewritten from {old.name!a} by qflux.migrate."]
    head += [f"# dropped {name}: {why}" for name, why in dict.fromkeys(result.dropped)]
    return "\n".join(head) + "\n" + write_yaml(tree), result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (0 done, 2 the new file needs a hand or nothing was written)."""
    parser = argparse.ArgumentParser(prog="python -m qflux.migrate", description="Rewrite a config of an old layout.")
    parser.add_argument("old", type=Path, metavar="OLD.yaml")
    parser.add_argument("-o", "--out", type=Path, metavar="NEW.yaml", help="default: OLD.new.yaml beside the old file")
    options = parser.parse_args(arguments)
    new = options.out or options.old.with_name(f"{options.old.stem}.new.yaml")
    try:
        text, result = migrated_text(options.old, new)
        atomic.sweep(new.parent)
        atomic.write_new_text(new, text)
        for name, target in result.moved:
            print(f"moved    {name} -> {target}")
        for name, why in dict.fromkeys(result.dropped):
            print(f"dropped  {name}: {why}")
        print(f"wrote {new}")
        load_config(new)
    except FileExistsError:
        print(f"{new}: exists already and is left alone; name another file with -o", file=sys.stderr)
        return USER
    except OSError as error:
        print(f"{new}: {(error.strerror or 'cannot be written').lower()}", file=sys.stderr)
        return USER
    except QfluxError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return DONE


if __name__ == "__main__":
    sys.exit(main())
