"""``--plan``: every shipped config, the demo's disk against a real run, the ladder, and no torch on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_project

from qflux.config import Config, load_config
from qflux.data.dataset import open_dataset
from qflux.errors import UserError
from qflux.main import import_trainer
from qflux.tools import plan_ladder
from qflux.tools.plan import make_plan, size
from qflux.tools.plan_data import UNREAD
from qflux.tools.plan_ladder import advise, fits, parse_memory
from qflux.tools.plan_phases import CONTEXT, Setup, needed, setup_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMA = json.loads((ROOT / "docs/schemas/plan.schema.json").read_text())
GIB = 1 << 30
REAL = {
    "FluxKontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "Flux": "black-forest-labs/FLUX.1-dev",
    "Flux2": "black-forest-labs/FLUX.2-dev",
    "Flux2Klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "QwenImage": "Qwen/Qwen-Image",
    "QwenImageEdit": "Qwen/Qwen-Image-Edit",
    "QwenImageEditPlus": "Qwen/Qwen-Image-Edit-2511",
}


def config_of(trainer="FluxKontext", model=None, **changes):
    """A config of a real model on a data set that is not there; ``changes`` are ``section__key=value``."""
    tree = {
        "model": {"pretrained_model_name_or_path": model or REAL[trainer]},
        "data": {"dataset_path": "nowhere/data", "target_size": [1024, 1024]},
        "train": {"trainer": trainer},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


def plan_of(config, memory=None):
    return make_plan(config, import_trainer(config), memory=memory)


def validate(found):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(found.to_json()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_planned(path, tiny_model):
    overrides = [f"model.pretrained_model_name_or_path={tiny_model}"] if path.stem.startswith("demo") else []
    config = load_config(path, overrides)
    began = time.perf_counter()
    found = plan_of(config, parse_memory("24GB"))
    assert time.perf_counter() - began < 2
    validate(found)
    text = found.text()
    assert UNREAD in text
    assert config.train.trainer in text
    assert f"steps: {config.train.max_train_steps} of" in text
    assert found.peak.bytes == max(phase.bytes for phase in found.phases)
    assert all(component.bytes > 0 for component in found.components)
    assert found.data.shapes[0].tokens.image > 0
    assert found.advice.reached


@pytest.mark.parametrize("trainer", REAL)
def test_every_family_is_planned_in_full_and_with_every_method(trainer):
    config = config_of(trainer)
    found = plan_of(config)
    validate(found)
    plain = found.estimate.component_bytes("transformer", found.setup)
    order = ["quanto-int8", "bnb-nf4", "quanto-int2"]
    sizes = [found.estimate.component_bytes("transformer", replace(found.setup, quantize=name)) for name in order]
    assert [plain, *sizes] == sorted([plain, *sizes], reverse=True)
    assert sizes[1] < 0.35 * plain
    every = plan_of(config.model_copy(update={"model": config.model.model_copy(update={"lora": None})}))
    validate(every)
    numbers = sum(c.parameters for c in every.components if c.name == "transformer")
    step = next(phase for phase in every.phases if phase.name == "training step")
    assert step.bytes > 16 * numbers
    assert every.disk.checkpoint > 12 * numbers


def test_the_published_figures_of_the_ancestors():
    """832 x 576, batch 2, with gradient checkpointing: 48.6 GB for the 20 B editor in bf16, 50 GB for Kontext."""
    for trainer, least, most in (("QwenImageEdit", 45e9, 50e9), ("FluxKontext", 25e9, 32e9)):
        sizes = {"data__batch_size": 2, "data__target_size": [832, 576], "train__gradient_checkpointing": "full"}
        found = plan_of(config_of(trainer, **sizes))
        assert least < found.peak.needed < most


def test_planning_needs_no_torch_and_no_network():
    code = """
import sys
sys.addaudithook(lambda event, args: sys.exit(f"opens {event}") if event.startswith("socket.") else None)
from qflux.main import main, import_trainer
from qflux.config import load_config
from qflux.tools.plan import make_plan
config = load_config(sys.argv[1])
make_plan(config, import_trainer(config), memory=24 << 30).text()
names = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
heavy = [name for name in names if name in sys.modules]
sys.exit(f"loads {heavy}" if heavy else 0)
"""
    words = [sys.executable, "-c", code, str(ROOT / "configs" / "flux2_dev_edit.yaml")]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 4


@pytest.fixture(scope="module")
def project_data(tmp_path_factory):
    return tiny_project.write_data(tmp_path_factory.mktemp("data"))


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw8bit", "adamw_schedule_free")]


@pytest.mark.parametrize("optimizer", ["adamw", *OTHERS])
def test_disk_is_what_a_run_leaves(optimizer, tmp_path, tiny_model, project_data, capfd):
    """Cache and checkpoint of a real run within two per cent; steps and micro-batches as they were."""
    project = tiny_project.Project(tmp_path, tiny_model, project_data, tmp_path / "cache", capfd)
    words = [
        *project.validating(2, samples=[], held_out=str(project_data.held)), f"train.optimizer.name={optimizer}",
        "train.max_train_steps=2", "train.checkpointing_steps=1", "train.checkpoints_total_limit=1", "model.lora.r=16",
        "data.caption_dropout_rate=0.2", *(["train.ema={}"] if optimizer == "adamw" else []),
    ]  # fmt: skip
    config = load_config(project.config, words)
    found = plan_of(config)
    validate(found)
    assert found.data.samples == 12
    run = project.train(*words)
    cache = sum(
        len(data) for name, data in tiny_project.folder_bytes(tmp_path / "cache").items() if name.endswith("tensors")
    )
    assert found.disk.cache.total == pytest.approx(cache, rel=0.02)
    saved = sum(map(len, tiny_project.folder_bytes(tiny_project.checkpoint(run, 2)).values()))
    assert found.disk.checkpoint == pytest.approx(saved, rel=0.02)
    assert found.disk.checkpoints == 1


def test_shapes_and_micro_batches_of_a_data_set_that_is_here(tmp_path, tiny_model, project_data):
    config = config_of(model=str(tiny_model), data__dataset_path=str(project_data.mixed), data__target_size=None,
                       data__allow_missing_controls=True, data__batch_size=2, train__gradient_accumulation_steps=3,
                       train__max_train_steps=100)  # fmt: skip
    found = plan_of(config)
    family = import_trainer(config).family
    dataset = open_dataset(config.data, family)
    assert {(s.target, *s.controls): s.samples for s in found.data.shapes} == dataset.counts()
    tokens = [shape.tokens.of("all") for shape in found.data.shapes]
    assert tokens == sorted(tokens, reverse=True)
    per_step = sum(shape.micro_batches for shape in found.data.shapes)
    assert 3 <= per_step <= 6
    assert found.as_dict()["steps"] == {
        "optimizer_steps": 100, "samples_per_step": 6, "samples": 600, "epochs": 50.0
    }  # fmt: skip
    assert make_plan(config, import_trainer(config), dataset=dataset).as_dict() == found.as_dict()
    (project_data.mixed / "training_images" / "odd.png").write_bytes(b"no picture")
    try:
        assert any("problems in the data set, run --check" in note for note in plan_of(config).notes)
    finally:
        (project_data.mixed / "training_images" / "odd.png").unlink()


def test_sizes_of_a_data_set_that_is_not_here():
    several = config_of("Flux", data__multi_resolutions=["1024*1024", [512, 768]], data__target_size=None)
    assert [shape.target for shape in plan_of(several).data.shapes] == [(1024, 1024), (512, 768)]
    assert plan_of(several).data.shapes[0].micro_batches is None
    piped = plan_of(config_of("QwenImageEdit", data__control_plan="pipeline", data__target_size=[512, 512]))
    assert piped.data.shapes[0].controls == ((1024, 1024),)
    assert 1300 < piped.data.shapes[0].tokens.text < 1500, "the picture's tokens are the text's too"
    bare = plan_of(config_of(data__target_size=None))
    assert bare.data.shapes[0].target == (1024, 1024)
    sized = plan_of(config_of("QwenImageEditPlus", data__controls_size=[[512, 512], [1024, 512]]))
    assert sized.data.shapes[0].controls == ((512, 512), (1024, 512))


def test_every_phase_that_a_config_asks_for():
    plain = [phase.name for phase in plan_of(config_of()).phases]
    assert plain == [
        "encoding: vae", "encoding: text_encoder", "encoding: text_encoder_2", "training step", "saving a checkpoint",
    ]  # fmt: skip
    validation = {"steps": 10, "samples": [{"prompt": "a"}], "held_out": "nowhere/held"}
    found = plan_of(config_of(logging__validation=validation, train__ema={}))
    assert {"held-out loss", "drawing samples"} <= {phase.name for phase in found.phases}
    step = next(phase for phase in found.phases if phase.name == "training step")
    assert {"vae", "average of the weights", "optimizer", "adapter", "gradients", "activations"} <= step.parts.keys()
    uncached = plan_of(config_of(cache__use_cache=False))
    step = next(phase for phase in uncached.phases if phase.name == "training step")
    assert {"text_encoder_2", "vae", "activations of the encoders"} <= step.parts.keys()
    assert uncached.disk.cache is None


def test_what_makes_memory_smaller():
    found = plan_of(config_of("Flux2"))
    setup = setup_of(found.config)

    def peak(**changes):
        phases = found.estimate.phases(replace(setup, **changes))
        return next(phase.bytes for phase in phases if phase.name == "training step")

    modes = [peak(checkpointing=mode) for mode in ("none", "ffn", "alternate", "selective", "full")]
    assert modes == sorted(modes, reverse=True)
    full = {"checkpointing": "full"}
    assert peak(**full, optimizer="adamw8bit") < peak(**full)
    assert peak(**full, quantize="bnb-nf4") < peak(**full, quantize="quanto-fp8") < peak(**full)
    few, many = peak(**full, offloaded=10), peak(**full, offloaded=50)
    assert many < few < peak(**full)
    assert peak(**full, devices=4) < peak(**full, devices=2) < peak(**full)
    assert found.estimate.host(replace(setup, offloaded=10)) > 10 * 900e6
    assert needed(10 * GIB) > 10 * GIB + CONTEXT


@pytest.mark.parametrize("trainer", REAL)
@pytest.mark.parametrize("memory", ["80GB", "24GB", "12GB"])
def test_the_ladder_finds_a_setup_that_fits_and_no_needless_rung(trainer, memory):
    found = plan_of(config_of(trainer), parse_memory(memory))
    advice = found.advice
    validate(found)
    assert advice.fits == (not advice.changes)
    if not advice.reached:
        assert advice.peak.needed > advice.memory
        assert "not even with all of these" in found.text()
        return
    assert fits(found.estimate, advice.setup, advice.memory)
    assert advice.peak.needed <= advice.memory
    assert len({change.key for change in advice.changes}) == len(advice.changes)
    fields = {"train.gradient_checkpointing": "checkpointing", "train.optimizer.name": "optimizer",
              "model.quantize": "quantize", "model.quantize_text_encoders": "quantize_text"}  # fmt: skip
    for change in advice.changes:
        if change.key in fields:
            back = {fields[change.key]: getattr(found.setup, fields[change.key])}
            assert not fits(found.estimate, replace(advice.setup, **back), advice.memory), change


def test_the_rungs_come_in_order():
    found = plan_of(config_of("FluxKontext", train__optimizer={"name": "adamw"}))
    known = [change.key for change in advise(found.estimate, found.setup, 14 * GIB).changes]
    assert known == ["train.gradient_checkpointing", "model.quantize"]
    small = advise(found.estimate, found.setup, 8 * GIB)
    assert small.reached
    assert [c.key for c in small.changes][-1] == "train.offload_blocks"
    blocks = small.setup.offloaded
    assert not fits(found.estimate, replace(small.setup, offloaded=blocks - 1), 8 * GIB), "the first that fits"
    uncached = plan_of(config_of(cache__use_cache=False, train__gradient_checkpointing="full"))
    assert [c.key for c in advise(uncached.estimate, uncached.setup, 32 * GIB).changes] == ["cache.use_cache"]


def test_a_network_too_large_for_one_card_is_split(monkeypatch):
    monkeypatch.setattr(plan_ladder, "_offload", lambda estimate, setup: iter(()))
    found = plan_of(config_of("Flux2", train__gradient_checkpointing="full"))
    advice = advise(found.estimate, found.setup, 18 * GIB)
    assert advice.reached
    assert advice.changes[-1].key == plan_ladder.CARDS
    assert advice.setup.devices == advice.changes[-1].value > 1


def test_full_training_gets_no_frozen_base():
    config = config_of("Flux2Klein")
    every = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    advice = plan_of(every, parse_memory("40GB")).advice
    assert not {"model.quantize", "train.offload_blocks"} & {change.key for change in advice.changes}
    assert "train.optimizer.name" in {change.key for change in advice.changes}


def test_a_run_that_cannot_fit_is_refused_with_what_to_change():
    found = plan_of(config_of())
    assert found.refusal(140 * GIB) == []
    lines = found.refusal(24 * GIB)
    assert any(line.startswith("memory: training step needs about ") for line in lines)
    assert all("the device has 24.0 GiB; set " in line and "model.quantize" in line for line in lines)
    assert any("lower data.target_size" in line for line in plan_of(config_of("Flux2")).refusal(2 * GIB))


def test_memory_of_a_card_is_read():
    assert parse_memory("24GB") == parse_memory("24") == parse_memory("24 GiB") == 24 * GIB
    assert parse_memory("23.5gb") == 23.5 * GIB
    assert parse_memory("24564MiB") == 24564 << 20
    for wrong in ("", "GB", "24 XB", "0GB", "-3GB", "24GB!"):
        with pytest.raises(UserError, match=r"--memory: found .* expected the memory of a card, for example 24GB"):
            parse_memory(wrong)


def test_what_cannot_be_planned_says_why(tmp_path):
    with pytest.raises(UserError, match=r"nobody/nothing is no local folder, and plans know of the hub only: black-"):
        plan_of(config_of(model="nobody/nothing"))
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="holds no safetensors weights"):
        plan_of(config_of(model=str(tmp_path)))
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: 'to_z' matches no module"):
        plan_of(config_of(model__lora={"target_modules": "to_z"}))


def test_figures_for_people():
    assert [size(n) for n in (12, 2048, 3 << 20, 24 * GIB)] == ["12 B", "2.0 KiB", "3.0 MiB", "24.0 GiB"]
    text = plan_of(config_of(), parse_memory("24GB")).text()
    assert "11.90 B" in text
    assert "22.2 GiB" in text
    assert "rank 16 on 190 layers, 18.68 M parameters" in text
    assert "the first change that fits:" in text


def test_a_setup_is_read_from_the_config():
    found = setup_of(config_of(train__gradient_checkpointing=True, train__mixed_precision="fp16"))
    assert found == Setup("fp16", "full", "adamw", True)
