"""The command line refuses what it would otherwise ignore."""

import pytest

from qflux.main import parse


@pytest.mark.parametrize(
    "words",
    [
        ["--checkpoint", "x"],
        ["--out", "x"],
        ["--json"],
        ["--cache", "--resume", "auto"],
        ["--sample", "--resume", "auto"],
        ["--check", "--checkpoint", "x"],
        ["--cache", "--sample"],
        ["--cache", "verify"],
        ["no_value"],
    ],
    ids=" ".join,
)
def test_words_without_a_meaning_end_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--config", "run.yaml", *words])
    assert ended.value.code == 2
    assert "qflux.main: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--sample", "--checkpoint", "x", "--out", "y"], ["--check", "--json"], ["--resume", "auto", "a.b=[1, 2]"]],
    ids=" ".join,
)
def test_words_that_belong_together(words):
    parse(["--config", "run.yaml", *words])
