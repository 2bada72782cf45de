"""A run's folder that was taken away while it lived, and one whose run.json was."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from qflux.errors import RunStopped, UserError
from qflux.runtime import run_folder
from qflux.runtime.checkpoint import save_checkpoint
from qflux.runtime.run_folder import open_run, read_record
from qflux.runtime.run_identity import identity_differences

IDENTITY = {"seed": 3, "data": "a"}

UNREADABLE = ["[" * 200_000, '{"exit_code": true}', "garbage", None]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "dump_config", lambda config: "")
    monkeypatch.setattr(run_folder, "_commit", lambda: None)
    return SimpleNamespace(
        logging=SimpleNamespace(output_dir=tmp_path, tracker_project_name="demo"),
        train=SimpleNamespace(max_train_steps=10, seed=3, trainer="Some", checkpoints_total_limit=None),
    )


def save(path: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(path, step, lambda folder: folder.joinpath("w.bin").write_text("weights"), IDENTITY, None)


def crashed(config, *steps: int) -> Path:
    """A run that was killed after these checkpoints."""
    with open_run(config, IDENTITY) as run:
        save(run.path, *steps)
    return run.path


@pytest.mark.parametrize("text", UNREADABLE, ids=["deep", "type", "text", "none"])
def test_checkpoints_tell_what_run_json_does_not(config, capsys, text):
    path = crashed(config, 2, 4)
    (path / "checkpoint-000004" / "w.bin").write_bytes(b"damaged")
    (path / "run.json").unlink()
    if text is not None:
        (path / "run.json").write_text(text)
    with open_run(config, IDENTITY, "auto") as run:
        assert (run.path, run.step) == (path, 2)
    assert f"{path} has no readable run.json; its checkpoint-000002 is of this run, which goes on" in (
        capsys.readouterr().out
    )
    assert read_record(path)["exit_code"] is None


def test_checkpoints_of_another_run_without_a_record_are_refused(config):
    path = crashed(config, 2)
    (path / "run.json").write_text("garbage")
    with pytest.raises(UserError, match=r"seed: 3 there, 4 now(.|\n)*without --resume"):
        open_run(config, {**IDENTITY, "seed": 4}, "auto")
    assert (path / "run.json").read_text() == "garbage"
    other = open_run(config, {**IDENTITY, "seed": 4})
    other.close()
    with open_run(config, {**IDENTITY, "seed": 4}, "auto") as run:
        assert run.path == other.path


def test_a_folder_in_the_place_of_run_json_is_refused(config):
    path = crashed(config, 2)
    (path / "run.json").unlink()
    (path / "run.json").mkdir()
    with pytest.raises(UserError, match=r"run\.json is a folder, expected a file; move it away"):
        open_run(config, IDENTITY, "auto")


def test_what_is_only_somebody_elses_is_not_continued(config, capsys):
    path = crashed(config, 2)
    (path / "run.json").write_text("garbage")
    (path / "checkpoint-000002" / "w.bin").unlink()
    with open_run(config, IDENTITY, "auto") as run:
        assert run.path.name == "v2"
    assert f"{path} has no readable run.json and is not continued" in capsys.readouterr().out


@pytest.mark.parametrize("put_back", [False, True], ids=["gone", "another"])
def test_a_folder_that_is_gone_is_noticed_and_not_made_anew(config, put_back):
    run = open_run(config, IDENTITY)
    save(run.path, 2)
    run.check()
    run.path.rename(run.path.parent / "moved")
    if put_back:
        shutil.copytree(run.path.parent / "moved", run.path)
    with pytest.raises(RunStopped, match=r"run folder .*v1 is gone or was moved; put it back and go on with --resume"):
        run.check()
    with pytest.raises(RunStopped):
        run.note("too late")
    there = read_record(run.path)
    run.finish(3, "gone", 2)
    assert read_record(run.path) == there
    assert run.path.exists() == put_back
    if put_back:
        shutil.rmtree(run.path)
    (run.path.parent / "moved").rename(run.path)
    with open_run(config, IDENTITY, "auto") as again:
        assert (again.path, again.step) == (run.path, 2)


def test_other_data_is_told_in_words(config):
    (line,) = identity_differences({"data": "a"}, {"data": "b"})
    told = 'data: a picture, mask or caption changed, came or went since the run began ("a" there, "b" now)'
    assert line.strip() == told
    crashed(config, 2)
    with pytest.raises(UserError, match=r"put the old files back, .*\(its config\.yaml has them\)"):
        open_run(config, {**IDENTITY, "data": "b"}, "auto")
