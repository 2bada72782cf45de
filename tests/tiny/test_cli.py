"""The command line: one line for what a user got wrong, exit codes that scripts can rely on, no foreign output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_project import Outcome, Project, adapter_bytes, finish, record


def refused(done: Outcome, *words: str) -> list[str]:
    """Lines of a message that ends with code 2 and names ``words``, without a traceback and without a run folder."""
    assert done.code == 2, done.out + done.err
    assert not done.made, "found before a run folder is made"
    assert "Traceback" not in done.out + done.err
    for word in words:
        assert word in done.err
    return done.err.splitlines()


def test_all_problems_of_a_config_at_once(project: Project) -> None:
    project.write({"train.max_step": 4, "data.batch_size": 0, "model.lora.rank": 4})
    lines = refused(project.run())
    found = {re.search(r"run\.yaml:(\d+)", line).group(1) for line in lines if "run.yaml:" in line}  # type: ignore[union-attr]
    text = project.config.read_text().splitlines()
    expected = {str(i) for i, line in enumerate(text, 1) if re.match(r"\s*(max_step|batch_size|rank):", line)}
    assert found == expected
    assert len(expected) == 3
    whole = "\n".join(lines)
    assert "max_train_steps" in whole, "the nearest valid key is not named"
    assert not (project.root / "runs").exists()


def test_bad_config_in_a_real_process(project: Project) -> None:
    project.write({"train.max_step": 4})
    done = finish(project.start())
    refused(done, "run.yaml:", "max_step")
    assert done.out == ""
    assert not (project.root / "runs").exists()


def test_wrong_override(project: Project) -> None:
    refused(project.run("train.max_step=3"), "train.max_step")


def test_word_without_a_value(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        project.run("train.max_train_steps")
    assert ended.value.code == 2
    assert "key.path=value" in capfd.readouterr().err


def test_missing_config_file(project: Project) -> None:
    project.config.unlink()
    refused(project.run(), "run.yaml")


def test_missing_data_set(project: Project) -> None:
    refused(project.run(f"data.dataset_path={project.root / 'nowhere'}"), "data.dataset_path", "nowhere")
    assert not (project.root / "runs").exists()


def test_every_broken_sample_is_named(project: Project) -> None:
    folder = project.root / "broken" / "training_images"
    folder.mkdir(parents=True)
    for stem in ("one", "two"):
        (folder / f"{stem}.png").write_bytes(b"no picture")
        (folder / f"{stem}.txt").write_text("a caption")
    refused(project.run(f"data.dataset_path={project.root / 'broken'}"), "one.png", "two.png")


def test_missing_held_out_set(project: Project) -> None:
    done = project.run(*project.validating(held_out=str(project.root / "nowhere")))
    refused(done, "nowhere")


def test_unknown_trainer(project: Project) -> None:
    lines = refused(project.run("train.trainer=FluxContext"), "train.trainer", "FluxContext", "FluxKontext")
    assert len(lines) == 1


def test_missing_model(project: Project) -> None:
    where = project.root / "no_model"
    refused(project.run(f"model.pretrained_model_name_or_path={where}"), "model.pretrained_model_name_or_path")


def test_incomplete_model(project: Project) -> None:
    where = project.root / "half"
    (where / "vae").mkdir(parents=True)
    done = project.run(f"model.pretrained_model_name_or_path={where}")
    refused(done, "model.pretrained_model_name_or_path", "transformer")


def test_target_modules_that_match_nothing(project: Project) -> None:
    done = project.run("model.lora.target_modules=[no_such_layer]")
    refused(done, "model.lora.target_modules", "no_such_layer")
    assert not list(project.root.rglob("v[0-9]*")), "found before a run folder is made"


def test_resume_names_what_differs(project: Project) -> None:
    project.train("train.max_train_steps=2")
    before = record(project.newest())
    changed = ["train.optimizer.lr=5e-4", "train.seed=8", "train.max_train_steps=3"]
    done = project.run("--resume", "auto", *changed)
    refused(done, "train.optimizer.lr: 0.001 there, 0.0005 now", "train.seed: 7 there, 8 now")
    assert "max_train_steps" not in done.err
    assert record(project.newest()) == before


def test_resume_sees_changed_data(project: Project) -> None:
    project.train("train.max_train_steps=2")
    done = project.run("--resume", "auto", "train.max_train_steps=3", f"data.dataset_path={project.data.held}")
    _, *differing, _ = refused(done)
    assert [line.split(maxsplit=1)[0] for line in differing] == ["data:"]


@pytest.mark.parametrize("what", ["missing", "empty", "damaged"])
def test_resume_from_a_bad_path(project: Project, what: str) -> None:
    path = project.root / "somewhere"
    if what == "empty":
        path.mkdir()
    elif what == "damaged":
        path = project.train() / "checkpoint-000004"
        (path / "state.json").write_text("{}")
    refused(project.run("--resume", path), "--resume")


def test_a_run_prints_only_our_lines(project: Project) -> None:
    """A real process with everything on: cache, adapter, schedule, EMA, pictures, held-out loss, TensorBoard."""
    done = finish(
        project.start(
            *project.mixed(),
            *project.validating(2),
            f"cache.cache_dir={project.root / 'own'}",
            "logging.report_to=tensorboard",
            "train.ema={}",
            "train.optimizer={name: adamw8bit}",
            "train.lr_scheduler={name: cosine, warmup_steps: 1}",
        )
    )
    assert done.code == 0
    assert done.foreign == []
    assert list(project.newest().rglob("events.out.tfevents.*"))
    shown = done.out.splitlines()
    assert [line.partition(":")[0] for line in shown[:3]] == ["FluxKontext", "plan", "plan"]
    assert shown[3] == f"run folder {project.newest()}"
    assert [line for line in shown if line.startswith("training 4/4")]
    assert shown[-1] == f"report {project.newest()}/report.html"


def test_full_training_prints_only_our_lines(project: Project) -> None:
    words = ["model.lora=null", "train.mixed_precision=bf16", "train.optimizer={name: prodigy, lr: 1.0}"]
    done = finish(project.start(*project.validating(2), *words, "train.gradient_checkpointing=full"))
    assert done.code == 0
    assert done.foreign == []


def test_check_mode(project: Project) -> None:
    done = project.run("--check", *project.mixed(), "--out", project.root / "checked")
    assert done.code == 0
    assert done.err == ""
    assert list((project.root / "checked").glob("*.png"))
    bad = project.run("--check", f"data.dataset_path={project.root / 'nowhere'}")
    assert bad.code == 2
    assert "nowhere" in bad.out + bad.err


def test_a_bug_leaves_a_traceback_and_code_1(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from qflux.trainer.base_trainer import BaseTrainer

    def broken(*args: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(BaseTrainer, "step", broken)
    done = project.run()
    assert done.code == 1
    assert "ZeroDivisionError: planted" in done.err
    assert record(project.newest())["exit_code"] == 1


def test_tracker_that_is_not_installed(project: Project) -> None:
    refused(project.run("logging.report_to=swanlab"), "logging.report_to", "swanlab")


def test_relative_paths(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the config they count from its folder, on the command line from the working directory."""
    (project.root / "deep").mkdir()
    (project.root / "deep" / "data").symlink_to(project.data.square)
    project.write({"data.dataset_path": "deep/data"})
    first = project.train()
    assert first == project.root / "runs" / "tiny" / "v1"
    project.write({"data.dataset_path": "nowhere", "logging.output_dir": "elsewhere"})
    done = project.run("data.dataset_path=deep/data")
    assert done.code == 0
    second = project.root / "elsewhere" / "tiny" / "v1"
    assert adapter_bytes(first, 4) == adapter_bytes(second, 4)
    assert Path(second / "report.html").is_file()
