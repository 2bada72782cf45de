"""The soak's sections: each is told of, and each test of the suite among them takes its number of trials."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from faults import amounts, soak

HERE = Path(__file__).parent
TESTS = {name: run for name, (_, run) in soak.SECTIONS.items() if isinstance(run, soak.Suite)}


def test_every_section_is_told_of() -> None:
    told = [line.split("  ")[0] for line in str(soak.__doc__).splitlines() if "  " in line]
    assert told == list(soak.SECTIONS)


@pytest.mark.parametrize("section", TESTS)
def test_a_section_is_a_test_that_takes_its_trials(section: str) -> None:
    tree = ast.parse((HERE / TESTS[section].file).read_text())
    assert TESTS[section].name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "amount" in [call.id for call in calls if isinstance(call, ast.Name)]


def test_trials_and_seed_reach_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, other = amounts.dice(3).random(), amounts.dice(4).random()
    assert (amounts.amount(7), amounts.dice(3).random()) == (7, usual)
    monkeypatch.setenv(amounts.TRIALS, "9")
    monkeypatch.setenv(amounts.SEED, "1")
    assert amounts.amount(7) == 9
    assert len({usual, other, amounts.dice(3).random()}) == 3


def test_a_section_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def wrong(trials: int, seed: int) -> str:
        raise AssertionError(f"{trials} of {seed}")

    monkeypatch.setattr(soak, "SECTIONS", {"one": (5, wrong), "two": (6, lambda trials, seed: "fine")})
    assert soak.main(["--seed", "2"]) == 1
    assert capfd.readouterr().out == "one, 5 trials, seed 2: WRONG: 5 of 2\ntwo, 6 trials, seed 2: fine\n"
    assert soak.main(["two", "--trials", "3"]) == 0
    assert capfd.readouterr().out == "two, 3 trials, seed 0: fine\n"
