"""Judges what the reader of configs makes of files and overrides that nobody would write; ``soak`` takes any seed."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from faults.config_cases import (
    KEYS,
    LISTED,
    LISTS,
    PICTURE,
    Case,
    Dice,
    Key,
    file_case,
    hurt_case,
    other_spelling,
    override_case,
    wrong_keys,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from qflux.config import dump_config, load_config
from qflux.config_errors import suggest
from qflux.config_yaml import key_text
from qflux.errors import UserError

BYTES = 80
LETTERS = "abcdefghijklmnopqrstuvwxyz_-0123456789"


@dataclass
class Tally:
    """What was seen so far."""

    cases: int = 0
    loaded: int = 0
    seconds: float = 0.0
    keys: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """One line."""
        mean = 1e3 * self.seconds / max(1, self.cases)
        return f"{self.cases} configs: {self.loaded} loaded, {self.cases - self.loaded} refused, {mean:.2f} ms each"


def read(folder: Path, case: Case) -> tuple[Any, list[str], float]:
    """(config or None, problems, seconds of this thread); anything but a config or a UserError passes through."""
    file = folder / "run.yaml"
    file.write_bytes(case.text)
    began = time.thread_time()
    try:
        return load_config(file, case.overrides), [], time.thread_time() - began
    except UserError as error:
        return None, error.problems, time.thread_time() - began


def judge(folder: Path, case: Case, tally: Tally) -> None:
    """Read a case and compare; AssertionError where what came of it is not what it says."""
    config, problems, spent = read(folder, case)
    tally.cases, tally.seconds, tally.loaded = (
        tally.cases + 1,
        tally.seconds + spent,
        tally.loaded + (config is not None),
    )
    wrong = None if case.tree is None else sorted(set(wrong_keys(case.tree)))
    tally.keys.update(key_text(key) for key in KEYS if case.tree is not None and _written(case.tree, key))
    assert all(line and line.isprintable() for line in problems), problems
    if config is None:
        assert problems
        if wrong and case.readable and "has the layout of an earlier version" not in problems[0]:
            silent = [key_text(key) for key in wrong if not any(f": {key_text(key)}" in line for line in problems)]
            assert not silent, f"not told: {silent} in {problems}"
        return
    assert not case.must_refuse, f"loaded: {case}"
    if case.tree is None:
        return
    assert not wrong, f"loaded with {wrong}"
    result = config.model_dump(mode="json")
    ignored = [name for name, value in case.tree.items() if not carried(value, result[name])]
    assert not ignored, f"{ignored} of {case.tree} became {result}"
    again = folder / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


def _written(tree: Any, key: Key) -> bool:
    for name in key:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


MEANT = {True: ("quanto-fp8", "full"), False: ("none",)}


def carried(given_: Any, result: Any) -> bool:
    """Whether a value that was written is in the result: itself, or the one form it is documented to take."""
    if given_ is None:
        return True
    if isinstance(given_, bool):
        return result is given_ or (isinstance(result, str) and result in MEANT[given_])
    if isinstance(given_, int | float):
        return result == given_ or result == str(given_)
    if isinstance(given_, str):
        if isinstance(result, list):
            return result == ([] if given_ == "none" else [given_]) or (len(result) == 1 and carried(given_, result[0]))
        return carried(given_, result["path"]) if isinstance(result, dict) else _same_text(given_, result)
    if isinstance(given_, list):
        if not isinstance(result, list):
            return False
        if result == [given_]:
            return True
        return len(given_) == len(result) and all(map(carried, given_, result))
    if isinstance(result, list):
        return len(result) == 1 and carried(given_, result[0])
    return isinstance(result, dict) and all(
        name in result and carried(value, result[name]) for name, value in given_.items()
    )


def _same_text(given_: str, result: Any) -> bool:
    if result == given_:
        return True
    return (
        isinstance(result, str) and result.startswith("/") and result.endswith(os.path.normpath(given_).lstrip("./~"))
    )


def judge_same(folder: Path, case: Case, change: Callable[[bytes], bytes], tally: Tally) -> None:
    """Another spelling of a file has the same outcome."""
    config, problems, spent = read(folder, case)
    other, others, more = read(folder, Case(change(case.text), case.overrides))
    tally.cases, tally.seconds, tally.loaded = (
        tally.cases + 2,
        tally.seconds + spent + more,
        tally.loaded + 2 * bool(config),
    )
    assert other == config
    bare = [sorted(re.sub(r":\d+: |in line \d+", ": ", line) for line in lines) for lines in (problems, others)]
    assert bare[0] == bare[1]


def typos(word: str) -> set[str]:
    """Every word one edit away: a letter dropped, put in, replaced, or swapped with its neighbour."""
    cuts = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    found = {left + right[1:] for left, right in cuts if right}
    found |= {left + letter + right for left, right in cuts for letter in LETTERS}
    found |= {left + letter + right[1:] for left, right in cuts if right for letter in LETTERS}
    found |= {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    return found - {word, ""}


def typo_figure(every: int = 1, start: int = 0) -> tuple[int, list[tuple[str, str, str | None]]]:
    """(typos tried, those whose suggestion is another key than the one meant) over all keys.

    ``every``-th typo of each key is tried, from the ``start``-th on.
    """
    tried, wrong = 0, []
    for key in {**KEYS, **LISTED}:
        parent: tuple[str | int, ...] = (*key[:-1], 0) if key[:-1] in LISTS else key[:-1]
        sisters = {other[-1] for other in {**KEYS, **LISTED} if other[:-1] == key[:-1]}
        for typo in sorted(typos(key[-1]) - sisters)[start % every :: every]:
            tried += 1
            found = suggest((*parent, typo))
            if found != key_text((*parent, key[-1])):
                wrong.append((key_text(key), typo, found))
    return tried, wrong


def drawn(strategy: st.SearchStrategy[Any], count: int, check: Callable[[Any], None], number: int) -> None:
    """``count`` examples of a strategy from a seed; raises what ``check`` raises, on the smallest example."""
    quiet = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    seed(number)(quiet(given(strategy)(lambda case: check(case))))()


def soak(trials: int, number: int) -> str:
    """``trials`` configs from seed ``number``, and every one-edit typo of every key; the figures as text."""
    tally = Tally()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / PICTURE).touch()
        for strategy, share in ((FILES, 6), (OVERRIDES, 3), (HURT, 1)):
            drawn(strategy, trials * share // 10, lambda case: judge(folder, case, tally), number)
    tried, wrong = typo_figure()
    return (
        f"{tally.text()}; typos: {tried - len(wrong)} of {tried} lead to the right key ({1 - len(wrong) / tried:.2%})"
    )
