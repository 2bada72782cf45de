"""10,000 configs that nobody would write: each loads with all it says, or is refused with all that is wrong with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import config_fuzz
from faults.config_cases import BYTES, KEYS, LISTED, Dice, file_case, hurt_case, other_spelling, override_case
from faults.config_fuzz import Tally, fuzz, judge, judge_same, soak, typo_figure, value_typo_figure
from faults.config_words import PICTURE

from qflux.config import Config, load_config
from qflux.config_errors import all_keys
from qflux.errors import UserError

SECONDS = 5e-3  # a config, on average
SEED = 20
LEAST_RIGHT = 0.95


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory and folder of the config, with the one picture that configs name."""
    (tmp_path / PICTURE).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("make", "count", "check", "keys"),
    [
        (file_case, 5500, judge, len(KEYS)),
        (override_case, 3000, judge, len(KEYS)),
        (hurt_case, 1000, judge, 0),
        (other_spelling, 500, judge_same, 0),
    ],
)
def test_a_config_loads_whole_or_is_refused_with_all_problems(
    folder: Path, make: Callable[[Dice], Any], count: int, check: Callable[..., None], keys: int
) -> None:
    tally = Tally()
    fuzz(make, lambda case: check(folder, case, tally), count, SEED)
    print(tally.text())
    assert tally.cases >= count
    assert 10 <= tally.loaded < 0.8 * tally.cases, "both ends are seen"
    assert len(tally.keys) >= keys, "every key was written"
    assert tally.seconds / tally.cases < SECONDS


def test_every_key_of_the_schema_is_written() -> None:
    assert {*KEYS, *LISTED} == set(all_keys())


def test_typos_of_every_key_lead_to_it() -> None:
    """Every twentieth of all words one edit away from a key; ``soak`` tries each."""
    tried, wrong = typo_figure(every=20, start=3)
    print(f"{tried - len(wrong)} of {tried}")
    assert tried > 20 * len(all_keys())
    assert len(wrong) <= (1 - LEAST_RIGHT) * tried, wrong


def test_typos_of_values_lead_to_them(folder: Path) -> None:
    tried, wrong = value_typo_figure(folder, every=20, start=3)
    print(f"{tried - len(wrong)} of {tried}")
    assert tried > 1000
    assert len(wrong) <= (1 - LEAST_RIGHT) * tried, wrong


def forgets_overrides(file: Path, overrides: Sequence[str] = ()) -> Config:
    return load_config(file)


def tells_one_problem(file: Path, overrides: Sequence[str] = ()) -> Config:
    try:
        return load_config(file, overrides)
    except UserError as error:
        raise UserError(*error.problems[:1]) from None


def forgets_a_key(file: Path, overrides: Sequence[str] = ()) -> Config:
    found = load_config(file, overrides)
    return found.model_copy(update={"train": found.train.model_copy(update={"max_skipped_steps": 10})})


def judge_some(folder: Path, count: int) -> None:
    chance = random.Random(SEED)
    for _ in range(count):
        judge(folder, override_case(Dice(chance.randbytes(BYTES))), Tally())


@pytest.mark.parametrize("reader", [forgets_overrides, tells_one_problem, forgets_a_key])
def test_a_worse_reader_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[..., Any]) -> None:
    monkeypatch.setattr(config_fuzz, "load_config", reader)
    with pytest.raises(AssertionError):
        judge_some(folder, 600)


def test_the_soak_reports_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_fuzz, "typo_figure", lambda: (100, [("a", "b", None)]))
    text = soak(100, 1)
    assert text.startswith("100 configs: ")
    assert text.endswith("; 99 of 100 typos lead to the key that was meant (99.00%)")
