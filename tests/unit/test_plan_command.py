"""``--plan`` on the command line, and the plan at the start of training."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import tiny_project
import torch
from real_models import GIB, SCHEMA

from qflux.config import load_config
from qflux.data.dataset import open_dataset
from qflux.demo import DEMOS
from qflux.errors import UserError
from qflux.io.tensors import save_tensors
from qflux.main import import_trainer, main, parse
from qflux.models.memory_rules import CONTEXT
from qflux.tools import plan_start
from qflux.tools.plan import make_plan
from qflux.tools.plan_data import UNREAD
from qflux.tools.plan_start import check_plan, memory_to_fit
from qflux.tools.plan_text import WIDTH
from qflux.types import EncodeStage, Family

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODEL = "model.pretrained_model_name_or_path"


def planned(capsys, *words):
    """(exit code, standard output, standard error) of ``--plan``."""
    capsys.readouterr()
    code = main(["--plan", "--config", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def overrides(path, tiny_model):
    """The demo's config names a folder that the demo writes."""
    return [f"{MODEL}={tiny_model}"] if path.stem.startswith("demo") else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_as_the_library_plans_it(path, tiny_model, capsys):
    changed = overrides(path, tiny_model)
    config = load_config(path, changed)
    found = make_plan(config, import_trainer(config), memory=24 * GIB)
    code, out, err = planned(capsys, path, "--json", "--memory", "24GB", *changed)
    assert (code, err) == (0, "")
    assert json.loads(out) == found.as_dict()
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(out))
    assert found.advice.reached
    code, out, err = planned(capsys, path, *changed)
    assert (code, err) == (0, "")
    assert out == make_plan(config, import_trainer(config)).text() + "\n"
    assert UNREAD in out
    assert f"steps: {config.train.max_train_steps} of " in out
    assert found.peak.bytes == max(phase.bytes for phase in found.phases)
    assert all(component.bytes > 0 for component in found.components)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_plan_is_not_too_wide_to_read(path, tiny_model, capsys):
    """With everything in it that can be: validation, averages, no cache, advice, notes, problems."""
    words = [
        "train.ema={}", "cache.use_cache=false", "train.offload_blocks=99", "train.offload_activations=true",
        "train.optimizer.name=adamw_schedule_free", "logging.validation.steps=10", "model.quantize_text_encoders=true",
        "logging.validation.samples=[{prompt: a}]", "logging.validation.held_out=nowhere", "model.quantize=quanto-int8",
        "train.gradient_checkpointing=none",
    ]  # fmt: skip
    code, out, _ = planned(capsys, path, "--memory", "24GB", *words, *overrides(path, tiny_model))
    assert code == 2
    wide = [line for line in out.splitlines() if len(line) > WIDTH]
    assert all("/" in line for line in wide), "only a path cannot be broken"
    tables = [block.splitlines() for block in out.split("\n\n")]
    phases = next(lines for lines in tables if lines[0].startswith("phase "))
    ends = phases[0].index("a card needs") + len("a card needs")
    assert all(line[ends - 1].isdigit() for line in phases[1:] if not line.startswith(("peak", "host")))


def test_planning_needs_no_torch_no_network_and_two_seconds():
    """All real models in one process; a process of its own for each takes a part of a second more."""
    code = """
import sys, time
sys.addaudithook(lambda event, args: sys.exit(f"opens {event}") if event.startswith("socket.") else None)
from qflux.main import main
for path in sys.argv[1:]:
    began = time.perf_counter()
    for more in ([], ["--json", "--memory", "24GB"]):
        assert main(["--config", path, "--plan", *more]) == 0, path
    taken = time.perf_counter() - began
    assert taken < 2, f"{path} took {taken} s"
names = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
heavy = [name for name in names if name in sys.modules]
sys.exit(f"loads {heavy}" if heavy else 0)
"""
    real = [str(path) for path in CONFIGS if not path.stem.startswith("demo")]
    assert {load_config(path).train.trainer for path in real} == {demo.trainer for demo in DEMOS.values()}
    done = subprocess.run(
        [sys.executable, "-c", code, *real], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [["--memory", "24GB"], ["--check", "--memory", "24GB"], ["--plan", "--memory", ""], ["--plan", "--out", "x"],
     ["--plan", "--resume", "auto"], ["--plan", "--checkpoint", "x"], ["--plan", "--check"], ["--cache", "--json"]],
    ids=" ".join,
)  # fmt: skip
def test_words_without_a_meaning(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--config", "run.yaml", *words])
    assert ended.value.code == 2
    assert "qflux.main: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--memory", "24 bananas"], '--memory: found 24 bananas, expected the memory of a card, for example "24GB"'),
        ([f"{MODEL}=nobody/nothing"], f"{MODEL}: nobody/nothing is no local folder, and plans know of the hub only: "),
        (["model.lora.target_modules=to_z"], "model.lora.target_modules: 'to_z' matches no module"),
        (
            ["train.memory_limit=much"],
            'command line: train.memory_limit: found "much", expected the memory of a card, for example "24GB"',
        ),
    ],
)
def test_what_a_user_got_wrong_is_one_line(words, told, capsys):
    code, out, err = planned(capsys, ROOT / "configs" / "flux_dev_t2i.yaml", *words)
    assert (code, out) == (2, "")
    assert err.startswith(told)
    assert len(err.splitlines()) == 1


def test_problems_are_part_of_the_plan(capsys):
    words = [ROOT / "configs" / "flux_dev_t2i.yaml", "train.offload_blocks=58", "train.gradient_checkpointing=none",
             "train.offload_activations=true", "model.quantize_text_encoders={text_encoder_3: true}"]  # fmt: skip
    code, out, err = planned(capsys, *words, "--json")
    assert (code, err) == (2, "")
    keys = [line.partition(":")[0] for line in json.loads(out)["problems"]]
    assert keys == ["model.quantize_text_encoders.text_encoder_3", "train.offload_activations", "train.offload_blocks"]
    code, out, _ = planned(capsys, *words)
    assert code == 2
    assert [line.split(":")[1].strip() for line in out.splitlines() if line.startswith("problem: ")] == keys


def lost_shard(model):
    weights = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(weights))


def no_weights(model):
    for path in (model / "vae").glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda model: shutil.rmtree(model / "text_encoder_2"), "has no component folder text_encoder_2; found: "),
        (lambda model: shutil.rmtree(model / "vae"), "has no component folder vae; found: "),
        (lost_shard, "lacks model-00001-of-00002.safetensors, which "),
        (lambda model: (model / "transformer" / "config.json").write_text("{"), "config.json cannot be read: "),
        (lambda model: (model / "text_encoder" / "config.json").write_text("[1]"), "found no JSON object"),
        (lambda model: (model / "model_index.json").write_text("[]"), "model_index.json cannot be read: "),
        (
            lambda model: (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "found a model of FluxPipeline, train.trainer: FluxKontext is for FluxKontextPipeline; use train.trainer: ",
        ),
        (no_weights, "holds no safetensors weights; fetch it again"),
    ],
    ids=["encoder", "vae", "shard", "json", "list", "index", "kind", "weights"],
)
def test_an_incomplete_model_is_refused_by_plan_and_check(damage, told, tmp_path, tiny_model, project_data, capfd):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    damage(model)
    project = tiny_project.Project(tmp_path, model, project_data, tmp_path / "cache", capfd)
    for mode in ("--plan", "--check"):
        done = project.run(mode)
        assert done.code == 2, mode
        lines = [line for line in " ".join((done.out + done.err).split()).split(f"{MODEL}: ")[1:] if told in line]
        assert len(lines) == 1, (mode, done)
        assert "Traceback" not in done.err


def test_a_whole_model_has_no_problem(project):
    assert project.run("--plan").code == 0
    assert project.run("--check").code == 0


def test_check_refuses_what_training_refuses_of_the_model(project, tmp_path):
    done = project.run("--check", "train.offload_blocks=5")
    assert done.code == 2
    assert "train.offload_blocks: found 5, expected 0 to 4, the network's blocks" in done.out
    model = Path(shutil.copytree(project.model, tmp_path / "packed"))
    file = model / "transformer" / "config.json"
    told = {"quantization_config": {"quant_method": "strange"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    done = project.run("--check", f"{MODEL}={model}")
    assert done.code == 2
    assert "holds weights quantized by strange" in done.out


@pytest.fixture(scope="module")
def project_data(tmp_path_factory):
    return tiny_project.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def project(tmp_path, tiny_model, project_data, capfd):
    return tiny_project.Project(tmp_path, tiny_model, project_data, tmp_path / "cache", capfd)


def test_training_refuses_what_cannot_fit(project):
    done = project.run("train.memory_limit=601MB")
    assert done.code == 2
    lines = done.err.splitlines()
    assert lines
    assert all(line.startswith("memory: ") and "the device has 601.0 MiB; " in line for line in lines)
    assert any(line.startswith("memory: training step needs about ") for line in lines)
    assert done.out.splitlines()[1].startswith("plan: a device needs about ")
    assert not (project.root / "runs").exists()
    done = project.run("train.offload_blocks=9")
    assert done.code == 2
    assert done.err == "train.offload_blocks: found 9, expected 0 to 4, the network's blocks\n"


def checked(project, capfd, *words, trainer=None, folder=None):
    """What ``check_plan`` says of a config, with the data set open."""
    config = load_config(project.config, words)
    trainer = trainer or import_trainer(config)
    datasets = [open_dataset(config.data, trainer.family)]
    capfd.readouterr()
    check_plan(config, trainer, datasets, folder or project.model)
    return capfd.readouterr().out.splitlines()


def test_the_open_data_set_is_not_read_again(project, capfd, monkeypatch):
    for module in ("plan_validation", "plan_data"):
        monkeypatch.setattr(f"qflux.tools.{module}.scan", lambda *args, **kwargs: pytest.fail("reads it again"))
    held = f"logging.validation={{steps: 2, held_out: {project.data.held}}}"
    lines = checked(project, capfd, held)
    assert len(lines) == 2
    assert lines[1].startswith("plan: the disk holds ")
    assert " of cache and 1 checkpoint of " in lines[1]


def test_a_limit_of_none_tries_it_all_the_same(project, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, GIB))
    with pytest.raises(UserError, match=r"memory: training step needs about .*, the device has 601\.0 MiB; "):
        checked(project, capfd)
    assert len(checked(project, capfd, "train.memory_limit=none")) == 2


def test_the_memory_that_a_plan_must_fit(monkeypatch):
    assert memory_to_fit("24GB") == 24 * GIB
    assert memory_to_fit("none") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory_to_fit(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    assert memory_to_fit(None) == 20 * GIB + CONTEXT
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * GIB - 1, 24 * GIB))
    assert memory_to_fit(None) == 24 * GIB
    assert memory_to_fit("none") is None


def undescribed(folder, layers=2):
    """A trainer without data of its own, and a local model whose blocks nobody has seen."""
    shapes = {"to_q.weight": (64, 64), "to_q.bias": (64,), "up.weight": (256, 64), "norm.weight": (64,)}
    tensors = {f"blocks.{i}.{name}": torch.zeros(shape) for i in range(layers) for name, shape in shapes.items()}
    tensors["blocks.0.extra.weight"] = torch.zeros(32, 64)  # the first block has a layer more
    (folder / "network").mkdir(parents=True)
    save_tensors(folder / "network" / "model.safetensors", tensors)
    (folder / "network" / "config.json").write_text('{"_class_name": "Unseen"}')
    family = Family(
        "unseen", "UnseenPipeline", (EncodeStage("vae", ("vae",), "image"),), denoiser="network", controls=(0, 8),
        adapter_targets={"attention": ("to_q", "extra")}, block_lists=("blocks",),
    )  # fmt: skip
    return type("Unseen", (), {"family": family, "__module__": __name__})


def test_a_family_without_data_is_planned_by_a_rule_of_thumb_that_only_warns(project, capfd, tmp_path):
    trainer = undescribed(tmp_path / "unseen")
    words = [f"{MODEL}={tmp_path / 'unseen'}", "train.memory_limit=1MB", "train.offload_blocks=1"]
    lines = checked(project, capfd, *words, trainer=trainer)
    assert lines[0].startswith("plan: a device needs about ")
    assert any(line.startswith("plan: by a rule of thumb, memory: training step needs about ") for line in lines)
    found = make_plan(load_config(project.config, words), trainer)
    assert found.rough
    assert any("rule of thumb" in note for note in found.notes)
    assert found.disk.cache is None
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(found.to_json()))


def test_a_hub_model_that_no_data_describes_is_planned_from_its_folder(project, capfd, tmp_path):
    words = [f"{MODEL}=somebody/finetune"]
    lines = checked(project, capfd, *words)
    assert lines == checked(project, capfd)
    (tmp_path / "empty").mkdir()
    (line,) = checked(project, capfd, *words, folder=tmp_path / "empty")
    assert line.startswith(f"plan: none, {MODEL}: ")
    assert "lacks config.json or safetensors weights" in line


def test_a_network_other_than_the_described_one_gets_the_rule_of_thumb(tmp_path, project):
    """The trainer is of a described family, the weights are of another kind: nothing of the description is used."""
    undescribed(tmp_path / "unseen")
    (tmp_path / "unseen" / "network").rename(tmp_path / "unseen" / "transformer")
    config = load_config(project.config, [f"{MODEL}={tmp_path / 'unseen'}", "model.lora.target_modules=[to_q]"])
    found = make_plan(config, import_trainer(config))
    assert found.rough
    assert found.peak.bytes > 0


def test_the_tiny_model_of_every_family(tmp_path, project_data, capfd):
    """Planned from the headers of its weights, in a moment, with the data that is there."""
    for name in DEMOS:
        folder = tmp_path / name
        DEMOS[name].write_model(folder / "model")
        config = load_config_of(folder, DEMOS[name], project_data)
        found = make_plan(config, import_trainer(config))
        assert not found.rough
        assert found.peak.needed < 2 * GIB
        assert math.prod(found.data.shapes[0].target) > 0
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(found.to_json()))


def load_config_of(folder, demo, data):
    """A config of a tiny model on the square pairs."""
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{pretrained_model_name_or_path: {folder / 'model'}}}\ndata: {{dataset_path: {data.square}}}\n"
        f"train: {{trainer: {demo.trainer}}}\n"
    )
    return load_config(path)


def test_the_check_is_not_made_where_nothing_is_trained(project, monkeypatch):
    monkeypatch.setattr(plan_start, "check_plan", lambda *args: pytest.fail("not training"))
    assert project.run("--cache", "train.memory_limit=1MB").code == 0
