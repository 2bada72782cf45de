from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

from qflux.errors import Locked, NoSpace, UserError
from qflux.io import atomic, faults
from qflux.runtime import run_folder
from qflux.runtime.checkpoint import list_checkpoints, save_checkpoint
from qflux.runtime.run_folder import RunFolder, open_run, read_record, run_folders
from qflux.runtime.run_identity import identity_differences

IDENTITY = {"model": {"lora": {"r": 16}, "targets": ("a", "b")}, "seed": 3}
SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "run.schema.json"


@pytest.fixture(autouse=True)
def plain_dump(monkeypatch):
    monkeypatch.setattr(run_folder, "dump_config", lambda config: f"steps: {config.train.max_train_steps}\n")
    monkeypatch.setattr(run_folder, "_commit", lambda: None)


@pytest.fixture
def config(tmp_path):
    return SimpleNamespace(
        logging=SimpleNamespace(output_dir=tmp_path / "out", tracker_project_name="demo"),
        train=SimpleNamespace(max_train_steps=10, seed=3, trainer="Some", checkpoints_total_limit=None),
    )


def write(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"weights")


def save(run: RunFolder, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run.path, step, write, IDENTITY, None)


def log(run: RunFolder, *steps: int) -> None:
    with open(run.path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps)


def logged(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def crashed(config, *steps: int) -> Path:
    """A run that was killed after these checkpoints, each step logged and one line more."""
    run = open_run(config, IDENTITY)
    save(run, *steps)
    log(run, *range(max(steps, default=0) + 2))
    run.close()
    return run.path


def test_run_json_follows_its_schema_from_start_to_end(config):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    run = open_run(config, IDENTITY, device="cpu", data="abc", notes=["sizes come from the config"])
    record = read_record(run.path)
    jsonschema.validate(record, schema)
    assert (record["exit_code"], record["step"], record["started_step"]) == (None, 0, 0)
    assert record["identity"]["model"]["targets"] == ["a", "b"]
    assert record["versions"]["torch"]
    assert (run.path / "config.yaml").read_text() == "steps: 10\n"
    run.note("another")
    run.finish(0, "done", 10)
    record = read_record(run.path)
    jsonschema.validate(record, schema)
    assert (record["exit_code"], record["reason"], record["step"]) == (0, "done", 10)
    assert record["notes"] == ["sizes come from the config", "another"]


def test_every_start_makes_the_next_folder_and_empties_none(config):
    first = open_run(config, IDENTITY)
    first.finish(0, "done", 10)
    (first.path.parent / "v7").mkdir()
    (first.path.parent / "v7" / "mine.txt").write_text("mine")
    second = open_run(config, IDENTITY)
    second.close()
    assert (first.path.name, second.path.name) == ("v1", "v8")
    assert (first.path.parent / "v7" / "mine.txt").read_text() == "mine"
    assert [path.name for path in run_folders(first.path.parent)] == ["v1", "v7", "v8"]


def test_starts_at_the_same_time_never_share(config):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: run_folder._make_next(config.logging.output_dir), range(40)))
    assert sorted(path.name for path in paths) == sorted(f"v{k}" for k in range(1, 41))


def test_auto_continues_a_killed_run_in_place_at_its_newest_sound_checkpoint(config, capsys):
    path = crashed(config, 2, 4, 6)
    (path / "checkpoint-000006" / "w.bin").write_bytes(b"damaged")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    run = open_run(config, IDENTITY, "auto")
    assert (run.path, run.checkpoint, run.step) == (path, path / "checkpoint-000004", 4)
    assert logged(path) == [0, 1, 2, 3, 4]
    assert read_record(path)["started_step"] == 4
    assert (path / "checkpoint-000006").is_dir()
    assert "checkpoint-000006" in capsys.readouterr().out
    run.close()


def test_other_versions_of_the_libraries_are_told_and_not_refused(config, capsys):
    path = crashed(config, 2)
    with open_run(config, IDENTITY, "auto"):
        assert "versions" not in capsys.readouterr().out
    record = read_record(path)
    now = record["versions"]["diffusers"]
    for there, said in (("0.1.0", f"diffusers 0.1.0 there, {now} now"), (None, f"diffusers (absent) there, {now} now")):
        record["versions"]["diffusers"] = there
        (path / "run.json").write_text(json.dumps(record))
        with open_run(config, IDENTITY, path / "checkpoint-000002"):
            lines = [line for line in capsys.readouterr().out.splitlines() if "versions" in line]
        assert len(lines) == 1
        assert lines[0].endswith(f": {said}")
        assert read_record(path)["versions"]["diffusers"] == now
    (path / "run.json").write_text(json.dumps({**record, "versions": "all"}))
    open_run(config, IDENTITY, "auto").close()
    assert "versions" not in capsys.readouterr().out


def test_auto_starts_at_zero_in_place_without_a_checkpoint(config):
    path = crashed(config)
    with open_run(config, IDENTITY, "auto") as run:
        assert (run.path, run.checkpoint, run.step) == (path, None, 0)
        assert logged(path) == []


def test_auto_makes_a_new_folder_where_nothing_can_be_continued(config):
    with open_run(config, IDENTITY, "auto") as run:
        assert run.path.name == "v1"
        run.finish(0, "done", 10)
    with open_run(config, IDENTITY, "auto") as run:
        assert run.path.name == "v2"


def test_auto_lengthens_a_finished_run(config):
    with open_run(config, IDENTITY) as run:
        save(run, 10)
        run.finish(0, "done", 10)
    config.train.max_train_steps = 20
    with open_run(config, IDENTITY, "auto") as run:
        assert (run.path.name, run.step) == ("v1", 10)
        assert read_record(run.path)["max_train_steps"] == 20
        assert (run.path / "config.yaml").read_text() == "steps: 20\n"


def test_auto_takes_the_newest_of_equal_identity(config):
    path = crashed(config, 2)
    open_run(config, {**IDENTITY, "seed": 4}).close()
    with open_run(config, IDENTITY, "auto") as run:
        assert run.path == path


def test_auto_refuses_another_identity_and_lists_the_keys(config):
    crashed(config, 2)
    other = {"model": {"lora": {"r": 8}, "targets": ("a", "b")}, "data": "x", "seed": 3}
    with pytest.raises(UserError) as caught:
        open_run(config, other, "auto")
    text = str(caught.value)
    assert "model.lora.r: 16 there, 8 now" in text
    assert (
        'data: a picture, mask or caption changed, came or went since the run began ((absent) there, "x" now)' in text
    )
    assert "targets" not in text
    assert "without --resume" in text
    assert [path.name for path in run_folders(config.logging.output_dir / "demo")] == ["v1"]


def test_auto_takes_up_a_folder_that_was_only_made_but_none_of_somebody_else(config, capsys):
    root = config.logging.output_dir / "demo"
    (root / "v1").mkdir(parents=True)
    (root / "v2").mkdir()
    (root / "v2" / "mine.txt").write_text("mine")
    with open_run(config, IDENTITY, "auto") as run:
        assert run.path.name == "v1"
    assert "v2 has no readable run.json" in capsys.readouterr().out


@pytest.mark.parametrize("point", ["record.before", "record.after", "rename.after"])
def test_auto_takes_up_a_folder_whose_run_was_killed_at_once(config, monkeypatch, point):
    """Wherever the first start ended: the next one is in the same folder, with all its files."""
    arrival = {"record.before": 1, "record.after": 1, "rename.after": 3}[point]  # the third file is config.yaml
    for kind, start in (("raise", 0), ("", 1)):
        monkeypatch.setenv("QFLUX_FAULT", f"{point}:{faults.arrivals[point] + arrival}:raise" if kind else "")
        try:
            open_run(config, IDENTITY, "auto").close()
        except RuntimeError:
            assert not start
    (path,) = run_folders(config.logging.output_dir / "demo")
    assert read_record(path)["exit_code"] is None
    assert (path / "config.yaml").is_file()


@pytest.mark.parametrize("point", ["record.before", "record.after", "rename.after"])
def test_a_start_on_a_full_disk_says_so(config, monkeypatch, point):
    arrival = {"record.before": 1, "record.after": 1, "rename.after": 3}[point]
    monkeypatch.setenv("QFLUX_FAULT", f"{point}:{faults.arrivals[point] + arrival}:enospc")
    with pytest.raises(NoSpace):
        open_run(config, IDENTITY, "auto")
    (path,) = run_folders(config.logging.output_dir / "demo")
    told = read_record(path)
    assert (told["exit_code"], told["step"]) == (74, 0)
    assert "no space left" in told["reason"]
    assert not list(path.glob(f"{atomic.TEMP_PREFIX}*"))
    monkeypatch.delenv("QFLUX_FAULT")
    with open_run(config, IDENTITY, "auto") as again:
        assert again.path == path


def test_a_resume_makes_up_for_a_rotation_and_for_sweeping(config):
    path = crashed(config, 2, 4, 6)
    (path / "samples" / "step-000002").mkdir(parents=True)
    left = [path / "samples" / "step-000002", path / "samples", path]
    for folder in left:
        for owned in (f"{2**22 + 12345}-1", "1-0123456789ab.1"):  # the second is of another container
            (folder / f"{atomic.TEMP_PREFIX}{owned}-x.png").write_text("half")
        (folder / "x.png").write_text("whole")
    config.train.checkpoints_total_limit = 2
    with open_run(config, IDENTITY, "auto") as run:
        assert run.step == 6
    assert [path.name for path in list_checkpoints(path)] == ["checkpoint-000004", "checkpoint-000006"]
    assert all([name.name for name in folder.glob("*.png")] == ["x.png"] for folder in left)
    assert not list(path.rglob(f"{atomic.TEMP_PREFIX}*"))


def test_a_resume_keeps_what_it_goes_on_from(config):
    """After a kill between the two renames of a save only the checkpoint that was moved aside is there."""
    path = crashed(config, 2, 4)
    left = path / "checkpoint-000004.old"
    (path / "checkpoint-000004").rename(left)
    config.train.checkpoints_total_limit = 1
    with open_run(config, IDENTITY, "auto") as run:
        assert (run.step, run.checkpoint) == (4, left)
        assert list_checkpoints(path) == [left]
        save_checkpoint(path, 6, write, IDENTITY, 1)
        assert [each.name for each in list_checkpoints(path)] == ["checkpoint-000006"]


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"identity": null}', '{"identity": [1]}', '{"max_train_steps": null}', '{"exit_code": "0"}', "3"],
    ids=lambda text: text[:30],
)
def test_a_strangers_run_json_is_no_record(config, capsys, text):
    path = crashed(config)
    (path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"^--resume .*: its run\.json is damaged or not one that qflux wrote"):
        open_run(config, IDENTITY, str(path))
    with open_run(config, IDENTITY, "auto") as run:
        assert run.path.name == "v2"
    assert f"{path} has no readable run.json and is not continued" in capsys.readouterr().out


def test_a_folder_that_was_only_made_does_not_hide_a_run_that_got_further(config):
    path = crashed(config, 2)
    (path.parent / "v2").mkdir()
    with open_run(config, IDENTITY, "auto") as run:
        assert (run.path, run.step) == (path, 2)


def test_a_name_taken_by_something_else_is_refused_before_training(config):
    path = crashed(config, 2)
    (path / "checkpoint-000006").mkdir()
    (path / "checkpoint-000008").write_text("mine")
    with pytest.raises(UserError) as caught:
        open_run(config, IDENTITY, "auto")
    assert [Path(problem.split(":")[0]).name for problem in caught.value.problems] == [
        "checkpoint-000006",
        "checkpoint-000008",
    ]
    assert (path / "checkpoint-000008").read_text() == "mine"


def test_fewer_steps_than_were_made_are_refused(config):
    path = crashed(config, 2, 4)
    config.train.max_train_steps = 3
    for resume in ("auto", path):
        with pytest.raises(UserError, match=r"max_train_steps: found 3, but .*checkpoint-000004 is of step 4"):
            open_run(config, IDENTITY, resume)
    assert logged(path)[-1] >= 4
    with open_run(config, IDENTITY, path / "checkpoint-000002") as run:
        assert run.step == 2


def test_a_live_run_is_locked(config):
    with open_run(config, IDENTITY):
        for resume in ("auto", config.logging.output_dir / "demo" / "v1"):
            with pytest.raises(Locked):
                open_run(config, IDENTITY, resume)


def test_finish_lets_the_lock_go_even_on_a_full_disk(config, monkeypatch):
    run = open_run(config, IDENTITY)

    def fail(path, obj, room):
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_json", fail)
        with pytest.raises(OSError, match="disk"):
            run.finish(0, "done", 1)
    open_run(config, IDENTITY, "auto").close()


def test_a_path_to_a_run_folder_or_its_newest_checkpoint_continues_in_place(config):
    path = crashed(config, 2, 4)
    for resume in (path, str(path / "checkpoint-000004")):
        with open_run(config, IDENTITY, resume) as run:
            assert (run.path, run.checkpoint, run.step) == (path, path / "checkpoint-000004", 4)


def test_an_older_checkpoint_branches_into_a_new_folder(config):
    path = crashed(config, 2, 4)
    with open_run(config, IDENTITY, path / "checkpoint-000002") as run:
        assert (run.path.name, run.checkpoint, run.step) == ("v2", path / "checkpoint-000002", 2)
        assert logged(run.path) == [0, 1, 2]
    assert logged(path) == [0, 1, 2, 3, 4, 5]


def test_wrong_paths_are_refused_before_a_folder_is_made(config, tmp_path):
    path = crashed(config, 2, 4)
    with pytest.raises(UserError, match="no such folder"):
        open_run(config, IDENTITY, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither run\.json nor"):
        open_run(config, IDENTITY, tmp_path)
    with pytest.raises(UserError, match="seed: 3 there, 4 now"):
        open_run(config, {**IDENTITY, "seed": 4}, path / "checkpoint-000002")
    with pytest.raises(UserError, match="seed: 3 there, 4 now"):
        open_run(config, {**IDENTITY, "seed": 4}, path)
    (path / "checkpoint-000002" / "w.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        open_run(config, IDENTITY, path / "checkpoint-000002")
    assert [folder.name for folder in run_folders(path.parent)] == ["v1"]


def test_a_checkpoint_of_another_run_in_the_folder_is_refused(config):
    path = crashed(config, 2)
    save_checkpoint(path, 4, write, {**IDENTITY, "seed": 4}, None)
    with pytest.raises(UserError, match="seed: 4 there, 3 now"):
        open_run(config, IDENTITY, "auto")
    with pytest.raises(UserError):  # and the lock is free again
        open_run(config, IDENTITY, "auto")


def test_an_output_folder_that_cannot_be_made_is_the_users_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.logging.output_dir = tmp_path / "file"
    with pytest.raises(UserError, match=r"logging\.output_dir"):
        open_run(config, IDENTITY)


def test_identity_differences_name_nested_keys():
    assert identity_differences({"a": {"b": 1}, "c": []}, {"a": {"b": 1}, "c": []}) == []
    assert identity_differences({"a": {}}, {"a": {"b": None}}) == [
        "  a: {} there, (absent) now",
        "  a.b: (absent) there, null now",
    ]


def test_the_commit_is_the_checkouts_or_none(monkeypatch, tmp_path):
    monkeypatch.undo()
    commit = run_folder._commit()
    assert commit is None or len(commit) >= 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder._commit() is None
