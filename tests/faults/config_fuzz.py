"""Judges what the reader of configs makes of files and overrides that nobody would write; ``soak`` takes any seed."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from faults.config_cases import (
    BYTES,
    KEYS,
    LISTED,
    LISTS,
    Case,
    Dice,
    Key,
    branches,
    file_case,
    hurt_case,
    other_spelling,
    override_case,
    quoted,
    wrong_keys,
)
from faults.config_words import PICTURE
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from qflux.config import dump_config, load_config
from qflux.config_errors import suggest
from qflux.config_yaml import key_text
from qflux.errors import UserError

OLD = "has the layout of an earlier version"
FILLED = {"lora_alpha", "guidance_scale", "cache_dir"}  # null stands for a value that another key has
MEANT = {True: ("quanto-fp8", "full"), False: ("none",)}
MINIMAL = b"model: {pretrained_model_name_or_path: a/b}\ndata: {dataset_path: a}\ntrain: {trainer: Any}\n"
VALUES = {key: [word for option in branches(schema) for word in option.get("enum", ())] for key, schema in KEYS.items()}
SHARES = {file_case: 0.5, override_case: 0.3, hurt_case: 0.1}  # a pair of spellings is two configs
LETTERS = "abcdefghijklmnopqrstuvwxyz_-0123456789"


@dataclass
class Tally:
    """What was seen so far."""

    cases: int = 0
    loaded: int = 0
    seconds: float = 0.0
    keys: Counter[str] = field(default_factory=Counter)

    def count(self, config: Any, seconds: float) -> None:
        """One more, which took ``seconds``."""
        self.cases, self.loaded, self.seconds = self.cases + 1, self.loaded + bool(config), self.seconds + seconds

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
    tally.count(config, spent)
    tally.keys.update(key_text(key) for key in KEYS if _written(case.tree, key))
    assert all(line and line.isprintable() for line in problems), problems
    if config is None:
        assert problems
        if case.tree is not None and case.readable and not case.strange:
            silent = [key_text(key) for key in wrong_keys(case.tree) if not _told(key, problems)]
            assert not silent, f"not told: {silent} in {problems}"
        return
    assert not case.must_refuse, f"loaded: {case}"
    if case.tree is not None and not case.strange:
        wrong = list(wrong_keys(case.tree))
        assert not wrong, f"loaded with {wrong}"
        assert carried(case.tree, config.model_dump(mode="json")), f"{case.tree} became {config}"
    if tally.loaded % 8 == 0:  # a dump takes far longer than what is measured here
        again = folder / "again.yaml"
        again.write_text(dump_config(config), encoding="utf-8")
        assert load_config(again) == config


def _told(key: Key, problems: Sequence[str]) -> bool:
    """Whether a line names the key; of a file of an old layout only the keys that moved are named."""
    return OLD in problems[0] or any(f": {key_text(key)}" in line for line in problems)


def _written(tree: Any, key: Key) -> bool:
    for name in key:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def carried(given_: Any, result: Any, name: str = "") -> bool:
    """Whether a value that was written is in the result: itself, or the one form it is documented to take."""
    if given_ is None:
        return not result or isinstance(result, dict) or name in FILLED
    if isinstance(result, dict):
        if isinstance(given_, str):
            return carried(given_, result["path"])
        return isinstance(given_, dict) and all(
            part in result and carried(given_[part], result[part], part) for part in given_
        )
    if isinstance(result, list):
        if not isinstance(given_, list):
            return (given_ == "none" and not result) or (len(result) == 1 and carried(given_, result[0]))
        same = len(given_) == len(result) and all(map(carried, given_, result))
        return same or (len(result) == 1 and carried(given_, result[0]))
    if isinstance(given_, bool):
        return result is given_ or (isinstance(result, str) and result in MEANT[given_])
    if isinstance(given_, str) and str(result).startswith("/"):
        return str(result).endswith(os.path.normpath(given_).lstrip("./~"))
    return bool(result == (float(given_) if isinstance(result, float) else given_) or result == str(given_))


def judge_same(folder: Path, pair: tuple[Case, Case], tally: Tally) -> None:
    """Another spelling of a file has the same outcome, but for its lines."""
    ends = [read(folder, case) for case in pair]
    for config, _, spent in ends:
        tally.count(config, spent)
    assert ends[0][0] == ends[1][0], pair
    bare = [sorted(re.sub(r":\d+: |in line \d+", ": ", line) for line in problems) for _, problems, _ in ends]
    assert bare[0] == bare[1] or not pair[0].readable or pair[0].strange, pair


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
        for typo in _some(typos(key[-1]) - sisters, every, start):
            tried += 1
            found = suggest((*parent, typo))
            if found != key_text((*parent, key[-1])):
                wrong.append((key_text(key), typo, found))
    return tried, wrong


def value_typo_figure(folder: Path, every: int = 1, start: int = 0) -> tuple[int, list[tuple[str, str, str]]]:
    """The same for the values of every key that takes one of some words, as the reader's message says it."""
    tried, wrong = 0, []
    for key, words in VALUES.items():
        meant = [(word, typo) for word in words for typo in _some(typos(word) - {*words}, every, start)]
        for right, typo in meant:
            tried += 1
            _, problems, _ = read(folder, Case(MINIMAL, (f"{'.'.join(key)}={quoted(typo)}",)))
            if not any(f"did you mean {right}?" in line for line in problems):
                wrong.append((key_text(key), right, typo))
    return tried, wrong


def _some(words: set[str], every: int, start: int) -> list[str]:
    return sorted(words)[start % every :: every]


def fuzz(make: Callable[[Dice], Any], check: Callable[[Any], None], count: int, number: int) -> None:
    """Check ``count`` cases from a seed; what fails is raised of the smallest case that fails so."""

    def one(data: bytes) -> None:
        check(make(Dice(data)))

    quiet = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    seed(number)(quiet(given(st.binary(min_size=BYTES, max_size=BYTES))(one)))()


def soak(trials: int, number: int) -> str:
    """``trials`` configs from seed ``number``, and every one-edit typo of every key; the figures as text."""
    tally = Tally()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / PICTURE).touch()
        for make, share in SHARES.items():
            fuzz(make, lambda case: judge(folder, case, tally), int(trials * share), number)
        fuzz(other_spelling, lambda pair: judge_same(folder, pair, tally), trials // 20, number)
    tried, wrong = typo_figure()
    right = f"{tried - len(wrong)} of {tried} typos lead to the key that was meant ({1 - len(wrong) / tried:.2%})"
    return f"{tally.text()}; {right}"
