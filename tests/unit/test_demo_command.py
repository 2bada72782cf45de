"""`python -m qflux.demo`: usage, refusals, and what it writes."""

import pytest

from qflux.config import load_config
from qflux.demo.__main__ import main


@pytest.mark.parametrize("words", [[], ["flux_kontext"], ["run", "here", "there"]], ids=len)
def test_usage(words, capsys):
    assert main(words) == 2
    assert "usage: python -m qflux.demo" in capsys.readouterr().err


def test_a_demo_is_written_and_says_what_comes_next(tmp_path, capsys):
    assert main(["flux_kontext", str(tmp_path / "d")]) == 0
    assert "python -m qflux.main --config" in capsys.readouterr().out
    config = load_config(tmp_path / "d" / "config.yaml")
    assert config.train.trainer == "FluxKontext"
    assert len(config.logging.validation.samples) == 6


def test_running_what_is_not_there(tmp_path, capsys):
    assert main(["run", str(tmp_path)]) == 2
    assert "write it first with" in capsys.readouterr().err
