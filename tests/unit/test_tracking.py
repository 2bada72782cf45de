from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from PIL import Image

from qflux.errors import NoSpace, UserError
from qflux.runtime import tracking
from qflux.runtime.tracking import Tracker, check_trackers, read_metrics, trim_metrics

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "metrics.schema.json"
VALUES = {
    "epoch": 0.5,
    "samples": 8,
    "loss": 0.25,
    "grad_norm": 1.5,
    "lr": 1e-4,
    "samples_per_second": 3.0,
    "skipped": 0,
}


def config(*names: str) -> SimpleNamespace:
    return SimpleNamespace(logging=SimpleNamespace(report_to=names, tracker_project_name="demo"))


class Recorder:
    """Stands for one of accelerate's trackers."""

    name = "recorder"

    def __init__(self, fails: bool = False) -> None:
        self.seen: list = []
        self.fails = fails

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("no route")
        self.seen.append((step, values))

    def log_images(self, values, step):
        self.seen.append((step, sorted(values)))

    def finish(self):
        self.seen.append("finished")


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(tracking, "_start", lambda *_: made)
    monkeypatch.setattr(tracking, "check_trackers", lambda names: None)
    return made


def test_lines_follow_the_schema_and_are_there_at_once(tmp_path):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    tracker = Tracker(tmp_path, config(), main=True)
    tracker.log_held_out(0, 0.9, {0.25: 0.5, "high": float("nan")})
    tracker.log(2, **VALUES)
    tracker.log(3, **{**VALUES, "loss": float("inf"), "grad_norm": None})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: flushed line by line
    for line in lines:
        jsonschema.validate(json.loads(line), schema)
    assert json.loads(lines[0]) == {"step": 0, "val_loss": 0.9, "val_loss_sigma": {"0.25": 0.5, "high": None}}
    assert json.loads(lines[1]) == {"step": 2, **VALUES}
    assert list(json.loads(lines[1])) == ["step", *VALUES]
    assert json.loads(lines[2])["loss"] is None
    tracker.close()
    tracker.close()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"step": 2, **VALUES, "val_loss": 1.0}, schema)


def test_other_processes_write_nothing(tmp_path):
    with Tracker(tmp_path, config("tensorboard"), main=False) as tracker:
        tracker.log(1, loss=1.0)
        tracker.log_held_out(1, 1.0, {})
        tracker.log_images(1, {})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_refused_because_reading_it_would_wait(tmp_path):
    torch = pytest.importorskip("torch")
    with Tracker(tmp_path, config(), main=True) as tracker, pytest.raises(TypeError, match="Tensor"):
        tracker.log(1, loss=torch.tensor(1.0))


def test_trackers_get_finite_numbers_and_pictures(tmp_path, recorder):
    with Tracker(tmp_path, config("recorder"), main=True) as tracker:
        tracker.log(1, loss=0.5, grad_norm=float("nan"), lr=None)
        tracker.log_held_out(1, 0.5, {"a": 1.0})
        tracker.log_images(1, {"x": Image.new("RGB", (2, 2))})
    assert recorder.seen == [
        (1, {"loss": 0.5}),
        (1, {"val_loss": 0.5, "val_loss_sigma/a": 1.0}),
        (1, ["x"]),
        "finished",
    ]


def test_a_failing_tracker_is_reported_once_and_never_ends_the_run(tmp_path, recorder, capsys):
    recorder.fails = True
    with Tracker(tmp_path, config("recorder"), main=True) as tracker:
        tracker.log(1, loss=0.5)
        tracker.log(2, loss=0.5)
    assert capsys.readouterr().out.count("switched off") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_tracker_that_cannot_start_is_switched_off(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no login")

    monkeypatch.setattr(tracking, "_start", refuse)
    with Tracker(tmp_path, config("tensorboard"), main=True) as tracker:
        tracker.log(1, loss=0.5)
    assert "no login" in capsys.readouterr().out


def test_missing_trackers_are_named_all_at_once_with_what_to_install(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name != "tensorboard" else object())
    with pytest.raises(UserError) as caught:
        check_trackers(["tensorboard", "wandb", "swanlab"])
    assert len(caught.value.problems) == 2
    assert "qflux[wandb]" in str(caught.value)


def test_a_full_disk_is_said_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(tmp_path, config(), main=True)
    with pytest.raises(NoSpace, match=r"metrics\.jsonl"):
        tracker.log(1, loss=0.5)


def test_trimming_keeps_whole_lines_up_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    trim_metrics(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step}) for step in (0, 1, 3, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "los')
    trim_metrics(path, 3)
    assert path.read_text() == "\n".join(lines[:4]) + "\n"
    inode = path.stat().st_ino
    trim_metrics(path, 3)
    assert path.stat().st_ino == inode
    trim_metrics(path, -1)
    assert path.read_text() == ""


def test_tensorboard_through_accelerate_without_an_accelerator(tmp_path, capfd):
    from accelerate.state import PartialState

    before = dict(PartialState._shared_state)
    (tmp_path / "config.yaml").write_text("train: {}\n")
    with Tracker(tmp_path, config("tensorboard"), main=True) as tracker:
        tracker.log(1, loss=0.5)
        tracker.log_images(1, {"sheet": Image.new("RGB", (4, 3), "red")})
    assert capfd.readouterr() == ("", "")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert before == PartialState._shared_state
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]
    assert (events.Images("sheet")[0].width, events.Images("sheet")[0].height) == (4, 3)
