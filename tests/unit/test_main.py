"""The command line refuses what it would otherwise ignore."""

from pathlib import Path

import pytest

from qflux import main as main_module
from qflux.config import load_config
from qflux.errors import Interrupted
from qflux.main import opening, parse


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
        ["--cache", "tidy"],
        ["--cache", "verify", "gc"],
        ["--cache", "gc", "entry.safetensors"],
        ["--cache", "a.b=1", "verify"],
        ["--cache", "verify", "--json"],
        ["--cache", "gc", "--sample"],
        ["--cache", "explain"],
        ["--cache", "explain", "--out", "x"],
        ["--cache=verify"],
        ["verify", "--cache"],
        ["verify"],
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


@pytest.mark.parametrize(
    ("words", "care", "file", "overrides"),
    [
        (["--cache"], None, None, []),
        (["--cache", "a.b=1"], None, None, ["a.b=1"]),
        (["--cache", "verify"], "verify", None, []),
        (["x.y=2", "--cache", "gc", "a.b=1"], "gc", None, ["x.y=2", "a.b=1"]),
        (["--cache", "explain", "c=d.safetensors", "a.b=1"], "explain", "c=d.safetensors", ["a.b=1"]),
        (["--check", "a.b=verify"], None, None, ["a.b=verify"]),
    ],
    ids=str,
)
def test_words_behind_cache(words, care, file, overrides):
    args = parse(["--config", "run.yaml", *words])
    found = (args.cache, args.care, args.care_file, args.overrides)
    assert found == ("--cache" in words, care, file and Path(file), overrides)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "training to step 7"),
        (["--resume", "auto"], "training to step 7"),
        (["--cache"], "caching"),
        (["--cache", "gc"], "cache gc"),
        (["--sample"], "drawing samples"),
    ],
)
def test_the_first_line_says_what_was_understood(tmp_path, words, said):
    file = tmp_path / "run.yaml"
    file.write_text("model: {pretrained_model_name_or_path: a/b}\ndata: {dataset_path: x}\ntrain: {trainer: Any}\n")
    args = parse(["--config", str(file), *words, "train.max_train_steps=7"])
    assert opening(load_config(args.config, args.overrides), args) == f"Any: {said}, by {file}"


def test_a_signal_that_a_library_wrapped_is_still_that_signal(tmp_path, monkeypatch, capsys):
    """While a library imports, it may turn what the signal's handler raised into an error of its own."""

    def run(args, stop):
        try:
            stop._handle(15, None)
        except Interrupted as error:
            raise RuntimeError("failed to import") from error

    monkeypatch.setattr(main_module, "run", run)
    assert main_module.main(["--config", "any.yaml"]) == 143
    assert capsys.readouterr().err == "interrupted by signal 15\n"


@pytest.mark.parametrize("mode", ["--sample", "--check", "--push=me/it"])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_nothing_goes_where_a_file_is(tmp_path, capsys, place, mode):
    (tmp_path / "file").touch()
    config = Path(__file__).parents[2] / "configs/demo_flux_kontext.yaml"
    code = main_module.main(["--config", str(config), mode, "--out", str(tmp_path / place)])
    said = capsys.readouterr().err
    assert (code, len(said.splitlines())) == (2, 1), said
    assert said.startswith(f"--out: found {tmp_path / 'file'}, a file, expected a folder")
