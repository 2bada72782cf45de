from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from qflux.errors import NoSpace, RunStopped
from qflux.io.faults import arrivals
from qflux.runtime import checkpoint
from qflux.runtime.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    read_state,
    rotate,
    save_checkpoint,
    verify_checkpoint,
)
from qflux.types import TrainState

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
IDENTITY = {"model": "m", "seed": 3}


def content(text: str = "weights"):
    def write(folder: Path) -> None:
        (folder / "ema").mkdir()
        (folder / "ema" / "a.bin").write_bytes(text.encode() * 50)
        (folder / "b.bin").write_bytes(b"b")

    return write


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def check_schema(name: str, file: Path) -> None:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(file.read_text()), schema)


def test_a_checkpoint_verifies_and_follows_its_schemas(tmp_path):
    state = TrainState(step=5, samples=20, batch=4, seed=3)
    path = save_checkpoint(tmp_path, 5, content(), IDENTITY, None, state)
    assert path == tmp_path / "checkpoint-000005"
    assert verify_checkpoint(path) == []
    assert set(read_manifest(path)["files"]) == {"ema/a.bin", "b.bin", "state.json"}
    assert read_manifest(path)["identity"] == IDENTITY
    assert read_state(path) == state
    check_schema("manifest", path / "manifest.json")
    check_schema("state", path / "state.json")
    assert names(tmp_path) == ["checkpoint-000005"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000005"]


def test_bytes_are_a_function_of_the_content(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    for run, identity in ((first, IDENTITY), (second, dict(reversed(IDENTITY.items())))):
        run.mkdir()
        save_checkpoint(run, 1, content(), identity, None)
    for name in ("manifest.json", "state.json"):
        assert (first / "checkpoint-000001" / name).read_bytes() == (second / "checkpoint-000001" / name).read_bytes()
    assert str(tmp_path) not in (first / "checkpoint-000001" / "manifest.json").read_text()


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = save_checkpoint(tmp_path, 1, content("x"), IDENTITY, None)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        good = file.read_bytes()
        for position in range(0, len(good), 7):
            file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            assert verify_checkpoint(path), (file.name, position)
        file.write_bytes(good[:-1])
        # a manifest may lose its last newline: all it says is still there
        assert verify_checkpoint(path) or file.name == "manifest.json"
        file.unlink()
        assert verify_checkpoint(path)
        file.write_bytes(good)
    assert verify_checkpoint(path) == []


def test_the_newest_sound_checkpoint_is_found_and_damaged_ones_stay(tmp_path, capsys):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, content(str(step)), IDENTITY, None)
    (tmp_path / "checkpoint-000003" / "b.bin").write_bytes(b"c")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-000002"
    assert "checkpoint-000003 is damaged" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-000003").is_dir()
    assert find_checkpoint(tmp_path / "nowhere") is None


def test_rotation_keeps_the_newest_and_what_is_not_ours(tmp_path):
    (tmp_path / "checkpoint-000000").mkdir()
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, content(), IDENTITY, 2)
        if step == 4:
            (tmp_path / "checkpoint-000004" / "note.txt").write_text("mine")
    save_checkpoint(tmp_path, 6, content(), IDENTITY, 1)
    assert names(tmp_path) == ["checkpoint-000000", "checkpoint-000004", "checkpoint-000006"]
    assert (tmp_path / "checkpoint-000004" / "note.txt").read_text() == "mine"


def test_rotation_after_a_set_back_counts_only_steps_up_to_now(tmp_path):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, step, content(), IDENTITY, None)
    save_checkpoint(tmp_path, 3, content(), IDENTITY, 2)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000003", "checkpoint-000009"]


def test_a_failed_save_leaves_the_old_ones_and_no_rest(tmp_path):
    def full(folder: Path) -> None:
        (folder / "part").write_bytes(b"1")
        raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(tmp_path, 1, content(), IDENTITY, 1)
    with pytest.raises(NoSpace, match="bytes are free"):
        save_checkpoint(tmp_path, 2, full, IDENTITY, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-000001"


def test_the_writer_may_not_take_our_names(tmp_path):
    with pytest.raises(ValueError, match=r"state\.json"):
        save_checkpoint(tmp_path, 1, lambda folder: (folder / "state.json").write_text("{}") and None, IDENTITY, None)


def test_the_same_step_again_replaces_ours_only(tmp_path):
    path = save_checkpoint(tmp_path, 1, content("old"), IDENTITY, None)
    inode = path.stat().st_ino
    save_checkpoint(tmp_path, 1, content("old"), IDENTITY, None)
    assert path.stat().st_ino == inode  # equal bytes: nothing to replace
    save_checkpoint(tmp_path, 1, content("new"), IDENTITY, None)
    assert (path / "ema" / "a.bin").read_bytes().startswith(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]
    (tmp_path / "checkpoint-000002").mkdir()
    with pytest.raises(RunStopped, match="not a checkpoint of this run"):
        save_checkpoint(tmp_path, 2, content(), IDENTITY, None)
    assert list((tmp_path / "checkpoint-000002").iterdir()) == []


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path = save_checkpoint(tmp_path, 1, content(), IDENTITY, None)
    (path / "b.bin").write_bytes(b"c")
    save_checkpoint(tmp_path, 1, content(), IDENTITY, None)
    assert verify_checkpoint(path) == []
    (path / "manifest.json").write_text("{")
    save_checkpoint(tmp_path, 1, content(), IDENTITY, None)
    assert verify_checkpoint(path) == []
    assert names(tmp_path) == ["checkpoint-000001.old", "checkpoint-000001"]  # of an unknown content: kept


def test_killed_between_the_two_renames_the_old_one_is_found_and_later_removed(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 1, content("old"), IDENTITY, None)
    with monkeypatch.context() as patch:
        patch.setenv("QFLUX_FAULT", f"aside.after:{arrivals['aside.after'] + 1}:raise")
        with pytest.raises(RuntimeError, match="planted"):
            save_checkpoint(tmp_path, 1, content("new"), IDENTITY, None)
    assert not path.exists()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-000001.old"
    save_checkpoint(tmp_path, 1, content("new"), IDENTITY, 3)
    assert names(tmp_path) == ["checkpoint-000001"]


def aside(run: Path, step: int, monkeypatch) -> Path:
    """The state after a kill between the two renames: what was moved aside, sound, and no successor."""
    save_checkpoint(run, step, content("old"), IDENTITY, None)
    with monkeypatch.context() as patch:
        patch.setenv("QFLUX_FAULT", f"aside.after:{arrivals['aside.after'] + 1}:raise")
        with pytest.raises(RuntimeError, match="planted"):
            save_checkpoint(run, step, content("new"), IDENTITY, None)
    return run / f"{checkpoint.checkpoint_name(step)}.old"


def test_what_was_moved_aside_is_a_checkpoint_until_its_successor_stands(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 4, content(), IDENTITY, None)
    left = aside(tmp_path, 8, monkeypatch)
    rotate(tmp_path, 8, 1, keep=left)
    assert list_checkpoints(tmp_path) == [left]
    save_checkpoint(tmp_path, 12, content(), IDENTITY, 2)
    assert names(tmp_path) == [left.name, "checkpoint-000012"], "within the limit"
    save_checkpoint(tmp_path, 16, content(), IDENTITY, 2)
    assert names(tmp_path) == ["checkpoint-000012", "checkpoint-000016"]


def test_a_damaged_successor_does_not_supersede(tmp_path, monkeypatch):
    left = aside(tmp_path, 8, monkeypatch)
    after = save_checkpoint(tmp_path, 8, content("other"), IDENTITY, 1)
    assert names(tmp_path) == [after.name], "a sound one does"
    shutil.copytree(after, left)
    (after / "b.bin").write_bytes(b"c")
    rotate(tmp_path, 8, None, keep=left)
    rotate(tmp_path, 12, None)
    assert names(tmp_path) == [left.name, after.name]


def test_an_export_that_was_killed_does_not_keep_a_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, 1, content(), IDENTITY, 1)
    (path / f"{checkpoint.atomic.TEMP_PREFIX}{2**22 + 12345}-1-x.safetensors").write_text("half")
    save_checkpoint(tmp_path, 2, content(), IDENTITY, 1)
    assert names(tmp_path) == ["checkpoint-000002"]


def test_an_export_in_another_container_keeps_a_checkpoint_until_it_ends(tmp_path):
    path = save_checkpoint(tmp_path, 1, content(), IDENTITY, 1)
    unfinished = path / f"{checkpoint.atomic.TEMP_PREFIX}{2**22 + 12345}-0123456789ab.1-x.safetensors"
    unfinished.write_text("half")
    save_checkpoint(tmp_path, 2, content(), IDENTITY, 1)
    assert unfinished.read_text() == "half"
    unfinished.unlink()
    save_checkpoint(tmp_path, 3, content(), IDENTITY, 1)
    assert names(tmp_path) == ["checkpoint-000003"]


def test_a_checkpoint_that_does_not_read_back_stops_before_rotation(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, content(), IDENTITY, 1)
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda path: ["broken"])
    with pytest.raises(RunStopped, match="broken"):
        save_checkpoint(tmp_path, 2, content(), IDENTITY, 1)
    assert (tmp_path / "checkpoint-000001").is_dir()


def test_a_manifest_that_names_files_outside_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, content(), IDENTITY, None)
    manifest = read_manifest(path)
    manifest["files"]["../../secret"] = {"size": 1, "xxh3": "0"}
    manifest["xxh3"] = checkpoint._manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "outside" in verify_checkpoint(path)[0]


@pytest.mark.parametrize("again", ["checkpoint-000009", "checkpoint-000003", "checkpoint-000009.old"])
def test_a_copy_under_another_number_is_told_and_left_alone(tmp_path, capsys, again):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, content(str(step)), IDENTITY, None)
    copy = Path(shutil.copytree(tmp_path / "checkpoint-000002", tmp_path / again))
    (problem,) = verify_checkpoint(copy)
    assert problem.startswith(f"{copy / 'manifest.json'}: written at step 2, ")
    (tmp_path / "checkpoint-000004" / "b.bin").unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-000002"
    assert f"{again} is damaged and is not used: {problem}" in capsys.readouterr().out
    for step in (5, 9, 10, 11):
        save_checkpoint(tmp_path, step, content(str(step)), IDENTITY, 2)
    assert names(tmp_path)[-2:] == ["checkpoint-000010", "checkpoint-000011"]
    (kept,) = names(tmp_path)[:-2]
    assert (read_manifest(tmp_path / kept)["step"], kept.startswith(again[:17])) == (2, True)
    assert (tmp_path / kept / "b.bin").read_bytes() == b"b"
