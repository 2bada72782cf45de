"""Sharing a run: what is in the folder and what is not, what the hub is given, what the card's code draws."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from PIL import Image

from qflux.config import Config, load_config
from qflux.errors import UserError
from qflux.io.tensors import load_tensors, save_tensors
from qflux.models.adapters import METADATA_KEY
from qflux.runtime.checkpoint import save_checkpoint
from qflux.runtime.run_folder import open_run
from qflux.tools import push as module
from qflux.tools.push import newest_run, push, write_hub_folder
from qflux.types import Family, TrainState

TOKEN = "hf_" + "Zx9" * 11
HOME = "home-of-somebody"
WEIGHTS = "pytorch_lora_weights.safetensors"
NAME = "me/red-paint"


class Painter:
    """A trainer as far as sharing needs one."""

    family = Family(name="painter", pipeline_class="PainterPipeline", stages=(), controls=(0, 1))

    def __init__(self, config: Config, folder: Path, *, dtype: Any, device: Any) -> None:
        self.config = config

    def call_kwargs(self, sample: Any) -> dict[str, Any]:
        height, width = sample.sizes.target.size
        return {"image": sample.controls[0] if sample.controls else None, "height": height, "width": width}


def painter(config: Config) -> type[Painter]:
    """Stands for ``main.import_trainer``."""
    assert config.train.trainer == "Painter"
    return Painter


def write_adapter(folder: Path, step: int, value: float = 1.0) -> None:
    """An adapter with the metadata of a saved one."""
    info = {"steps": str(step), "data_digest": "d1ge57", "base_model": "model", "qflux_version": "1.2.3"}
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})
    tensor = torch.full((4, 2), value)
    save_tensors(folder / WEIGHTS, {"transformer.a.lora_A.weight": tensor}, {**info, METADATA_KEY: settings})


def write_network(folder: Path, step: int) -> None:
    """A whole network as a full training saves it."""
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "PainterTransformer"}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_tensors(weights, {"a": torch.ones(2)}, {"format": "pt"})


class Runs:
    """Hand-made runs of one config."""

    def __init__(self, root: Path) -> None:
        self.root = root / HOME
        self.root.mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (64, 48), "red").save(self.root / name)
        samples = [{"prompt": f"paint {name} [trigger]", "controls": [f"{name}.png"]} for name in "ab"]
        self.tree: dict[str, Any] = {
            "model": {"pretrained_model_name_or_path": "./models/model", "lora": {"r": 4}},
            "data": {"dataset_path": "pairs/train", "target_size": [48, 64], "trigger_word": "xyzzy"},
            "train": {"trainer": "Painter", "mixed_precision": "no"},
            "logging": {"output_dir": "runs", "tracker_project_name": "p", "validation": {"samples": samples}},
        }
        self.tree["data"]["mask_path"] = "private/masks"
        (self.root / "models" / "model").mkdir(parents=True)

    def make(self, *steps: int, write: Callable[[Path, int], None] = write_adapter) -> Path:
        """A run with a checkpoint and a validation after each of ``steps``, and a validation at 0."""
        (self.root / "run.yaml").write_text(json.dumps(self.tree))
        self.config = load_config(self.root / "run.yaml")
        run = open_run(self.config, {"seed": 0}, device="cuda:0", data="d1ge57")
        for step in (0, *steps):
            drawn = run.path / "samples" / f"step-{step:06d}"
            drawn.mkdir(parents=True)
            for name in ("sample-0", "sample-1", "sheet"):
                Image.new("RGB", (64, 48), (step, 0, 0)).save(drawn / f"{name}.png")
            (drawn / "scores.json").write_text("[]")
            if step:
                state = TrainState(step, 4 * step, 4, 0)
                save_checkpoint(run.path, step, lambda folder, step=step: write(folder, step), {}, None, state)
        lines = [{"step": step, "val_loss": step / 1000, "val_loss_sigma": {}} for step in steps]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.finish(0, "done", max(steps, default=0))
        return run.path


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """A place for runs."""
    return Runs(tmp_path)


class Hub:
    """The hub in memory: what it was asked, and the files it got."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.failure: Exception | None = None
        self.fails_at = "create_repo"

    def _call(self, name: str, options: dict[str, Any]) -> None:
        self.calls.append((name, options))
        if self.failure is not None and name == self.fails_at:
            raise self.failure

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self._call("create_repo", {"repo_id": repo_id, **options})

    def upload_folder(self, **options: Any) -> None:
        """Take the files that the patterns allow, as huggingface_hub chooses them."""
        self._call("upload_folder", options)
        folder = Path(options["folder_path"])
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()]
        chosen = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=options["allow_patterns"])
        self.files = {name: (folder / name).read_bytes() for name in chosen}

    def model_info(self, *_: Any, **__: Any) -> None:
        raise OfflineModeIsEnabled("offline")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub to which somebody is logged in by the environment."""
    fake = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def refused(action: Callable[[], Any]) -> list[str]:
    """The lines of the UserError that ``action`` raises."""
    with pytest.raises(UserError) as caught:
        action()
    return caught.value.problems


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()}


SHARED = {"README.md", WEIGHTS, "training_config.yaml"} | {
    f"samples/{n}.png" for n in ("sample-0", "sample-1", "sheet")
}


def test_the_hub_gets_the_files_of_the_newest_checkpoint(runs: Runs, hub: Hub, capsys: Any) -> None:
    run = runs.make(10, 20)
    assert push(run, NAME, painter) == f"https://huggingface.co/{NAME}"
    assert set(hub.files) == files_of(run / "hub") == SHARED
    assert hub.files[WEIGHTS] == (run / "checkpoint-000020" / WEIGHTS).read_bytes()
    assert hub.files["samples/sheet.png"] == (run / "samples" / "step-000020" / "sheet.png").read_bytes()
    (made, created), (sent, uploaded) = hub.calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert created == {"repo_id": NAME, "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == NAME
    assert not any("delete" in name or "token" in name for name in {**created, **uploaded})
    assert "20 steps" in uploaded["commit_message"]
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.instance_prompt == "xyzzy"
    assert [item["text"] for item in card.data["widget"]] == ["paint a xyzzy", "paint b xyzzy"]
    assert {item["output"]["url"] for item in card.data["widget"]} <= set(hub.files)
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", card.text)
    assert links
    assert set(links) <= set(hub.files)
    assert "| held-out loss at step 20 | 0.02 |" in card.text
    assert "| samples seen | 80 |" in card.text
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed to https://huggingface.co/{NAME}"


def test_an_earlier_checkpoint_comes_with_its_own_pictures(runs: Runs, hub: Hub) -> None:
    run = runs.make(10, 20)
    push(run / "checkpoint-000010", NAME, painter, private=False)
    assert hub.files["samples/sample-1.png"] == (run / "samples" / "step-000010" / "sample-1.png").read_bytes()
    assert "| optimizer steps | 10 |" in hub.files["README.md"].decode()
    assert "held-out loss at step 10 |" in hub.files["README.md"].decode()
    assert hub.calls[0][1]["private"] is False


def test_nothing_of_the_machine_is_shared(runs: Runs, hub: Hub) -> None:
    run = runs.make(10)
    push(run, NAME, painter)
    for name, content in hub.files.items():
        for secret in (TOKEN, HOME, str(run.parent), os.uname().nodename, "cuda:0"):
            assert secret.encode() not in content, name
    settings = yaml.safe_load(hub.files["training_config.yaml"])
    assert settings["model"]["pretrained_model_name_or_path"] == "model"
    assert settings["data"]["dataset_path"][0]["path"] == "train"
    assert settings["data"]["mask_path"] == "masks"
    assert settings["logging"]["output_dir"] == "runs"
    assert settings["logging"]["validation"]["samples"][1]["controls"] == ["b.png"]
    assert settings["train"] == Config.model_validate(settings).train.model_dump(mode="json")
    assert "base_model" not in ModelCard(hub.files["README.md"].decode()).data.to_dict()


def test_a_hub_model_keeps_its_name(runs: Runs) -> None:
    runs.tree["model"]["pretrained_model_name_or_path"] = "acme/painter"
    run = runs.make(10)
    folder = write_hub_folder(run, NAME, painter).path
    assert yaml.safe_load((folder / "training_config.yaml").read_text())["model"] == {
        **runs.config.model.model_dump(mode="json"),
        "pretrained_model_name_or_path": "acme/painter",
    }
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data["base_model_relation"]) == ("acme/painter", "adapter")
    assert card.data.license_name == "same-as-base"


def test_the_same_run_gives_the_same_bytes(runs: Runs, tmp_path: Path) -> None:
    run = runs.make(10)
    once = write_hub_folder(run, NAME, painter).path
    again = write_hub_folder(run, NAME, painter, out=tmp_path / "out").path
    assert again == tmp_path / "out"
    assert files_of(once) == files_of(again) == SHARED
    assert all((once / name).read_bytes() == (again / name).read_bytes() for name in SHARED)
    assert write_hub_folder(run, NAME, painter).path == once  # written again, over the earlier one


def test_averaged_weights_are_shared_where_there_are_some(runs: Runs) -> None:
    def write(folder: Path, step: int) -> None:
        write_adapter(folder, step)
        write_adapter(folder / "ema", step, value=7.0)

    run = runs.make(10, write=write)
    folder = write_hub_folder(run, NAME, painter).path
    assert float(load_tensors(folder / WEIGHTS)["transformer.a.lora_A.weight"][0, 0]) == 7.0
    assert "moving average" in (folder / "README.md").read_text()


def test_a_whole_network_is_shared_as_a_folder(runs: Runs, hub: Hub) -> None:
    runs.tree["model"]["lora"] = None
    run = runs.make(10, write=write_network)
    push(run, NAME, painter)
    network = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    assert set(hub.files) == (SHARED - {WEIGHTS}) | network
    text = hub.files["README.md"].decode()
    assert 'PainterTransformer.from_pretrained("me/red-paint", subfolder="transformer", dtype=torch.float32)' in text
    assert "lora" not in ModelCard(text).data.tags


def test_the_comfyui_export_of_the_same_adapter_is_shared(runs: Runs, hub: Hub) -> None:
    run = runs.make(10)
    export = run / "checkpoint-000010" / "pytorch_lora_weights_comfyui.safetensors"
    info = {"data_digest": "d1ge57", "base_model": "model", "export": "comfyui"}
    save_tensors(export, {"a": torch.ones(1)}, {**info, "steps": "9"})
    push(run, NAME, painter)
    assert set(hub.files) == SHARED  # it was made from another adapter
    save_tensors(export, {"a": torch.ones(1)}, {**info, "steps": "10"})
    push(run, NAME, painter)
    assert set(hub.files) == SHARED | {export.name}
    assert f"[{export.name}]({export.name})" in hub.files["README.md"].decode()


def test_pictures_are_few_and_never_those_before_training(runs: Runs) -> None:
    runs.tree["logging"]["validation"]["samples"] *= 6
    run = runs.make(10)
    for i in range(12):
        Image.new("RGB", (64, 48)).save(run / "samples" / "step-000010" / f"sample-{i}.png")
    shared = set(write_hub_folder(run, NAME, painter).files)
    assert {name for name in shared if "sample-" in name} == {f"samples/sample-{i}.png" for i in range(8)}
    for path in (run / "samples" / "step-000010").iterdir():
        path.unlink()
    (run / "hub").rename(run / "hub-before")
    assert not {name for name in write_hub_folder(run, NAME, painter).files if name.startswith("samples")}
    assert "It was not evaluated" not in (run / "hub" / "README.md").read_text()  # it has a held-out loss


def test_a_run_is_shared_after_its_pictures_moved_away(runs: Runs) -> None:
    run = runs.make(10)
    for name in ("a.png", "b.png"):
        (runs.root / name).unlink()
    text = (write_hub_folder(run, NAME, painter).path / "README.md").read_text()
    assert "    height=48,\n    width=64,\n" in text


def test_the_newest_run_with_a_checkpoint_is_found(runs: Runs) -> None:
    run = runs.make(10)
    runs.make()
    assert newest_run(runs.config) == run
    (problem,) = refused(lambda: write_hub_folder(run.parent / "v2", NAME, painter))
    assert "found no checkpoint" in problem
    (problem,) = refused(lambda: write_hub_folder(run.parent / "v7", NAME, painter))
    assert "found no checkpoint" in problem
    empty = runs.config.logging.model_copy(update={"tracker_project_name": "other"})
    (problem,) = refused(lambda: newest_run(runs.config.model_copy(update={"logging": empty})))
    assert "found no run with a checkpoint" in problem


def test_damage_is_not_shared(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.make(10)
    adapter = run / "checkpoint-000010" / WEIGHTS
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1] + b"\x00")
    assert WEIGHTS in refused(lambda: write_hub_folder(run / "checkpoint-000010", NAME, painter))[0]
    adapter.write_bytes(whole)
    monkeypatch.setattr(module.shutil, "copyfile", lambda source, target: Path(target).write_bytes(b"other"))
    (problem,) = refused(lambda: write_hub_folder(run, NAME, painter))
    assert "is not what checkpoint-000010 holds" in problem


def test_a_checkpoint_without_its_run_is_refused(runs: Runs) -> None:
    run = runs.make(10)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("target_size", "target_sise"))
    assert "is not the config of a run" in refused(lambda: write_hub_folder(run, NAME, painter))[0]
    (run / "config.yaml").unlink()
    assert "config.yaml is missing" in refused(lambda: write_hub_folder(run, NAME, painter))[0]


@pytest.mark.parametrize("repo", ["red-paint", "me/red/paint", "me/red paint", "me/-", "", "me/a..b"])
def test_a_wrong_repository_id_is_refused_before_anything_is_written(runs: Runs, hub: Hub, repo: str) -> None:
    run = runs.make(10)
    (problem,) = refused(lambda: push(run, repo, painter))
    assert problem.startswith("--push: ")
    assert not (run / "hub").exists()
    assert not hub.calls


def test_a_folder_of_somebody_elses_is_not_touched(runs: Runs, hub: Hub, tmp_path: Path) -> None:
    run = runs.make(10)
    mine = tmp_path / "mine"
    (mine / "samples").mkdir(parents=True)
    (mine / "samples" / "diary.txt").write_text("private")
    (mine / ".hidden").write_text("left alone")
    (problem,) = refused(lambda: push(run, NAME, painter, out=mine))
    assert "samples/diary.txt" in problem
    assert files_of(mine) == {"samples/diary.txt"}
    assert "holds files" in refused(lambda: push(run, NAME, painter, out=run))[0]
    assert ".hidden, a file, expected a folder" in refused(lambda: push(run, NAME, painter, out=mine / ".hidden"))[0]
    assert not hub.calls
    (mine / "samples" / "diary.txt").unlink()
    (mine / ".hidden").unlink()
    push(run, NAME, painter, out=mine)
    assert set(hub.files) == SHARED


def http(status: int, text: str = "the server's words") -> HfHubHTTPError:
    """What huggingface_hub raises for an answer of the hub."""
    request = httpx.Request("POST", "https://huggingface.co/api")
    return HfHubHTTPError(text, response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (http(401), "does not accept the login"),
        (http(403), f"no right to write to {NAME}; take a repository of your own"),
        (http(404), f"the hub has no {NAME}"),
        (http(500, "two\nlines"), "the hub refused it (500: two lines)"),
        (OfflineModeIsEnabled("offline mode is enabled"), "out of reach (offline mode is enabled)"),
        (httpx.ConnectError("no route"), "out of reach (no route)"),
        (RuntimeError("storage said no"), "the upload failed (storage said no)"),
    ],
)
@pytest.mark.parametrize("where", ["create_repo", "upload_folder"])
def test_what_goes_wrong_at_the_hub_is_one_line_and_a_way_out(
    runs: Runs, hub: Hub, failure: Exception, said: str, where: str
) -> None:
    run = runs.make(10)
    hub.failure, hub.fails_at = failure, where
    problem, way_out = refused(lambda: push(run, NAME, painter))
    assert said in problem
    assert "\n" not in problem
    assert files_of(run / "hub") == SHARED
    command = shlex.split(way_out.partition("by hand: ")[2])
    assert command == ["hf", "upload", NAME, str(run / "hub"), ".", "--private"]


def test_without_a_login_the_folder_is_ready(runs: Runs, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.make(10)
    monkeypatch.delenv("HF_TOKEN")
    problem, way_out = refused(lambda: push(run, NAME, painter, private=False))
    assert "not logged in" in problem
    assert "--private" not in way_out
    assert files_of(run / "hub") == SHARED
    assert not hub.calls
