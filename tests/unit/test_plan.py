"""The planner: every shipped config, the demo's disk against a real run, what makes memory smaller, the ladder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_project
from real_models import GIB, REAL, SCHEMA

from qflux.config import Config, load_config
from qflux.config_values import memory_bytes
from qflux.data.dataset import open_dataset
from qflux.errors import UserError
from qflux.main import import_trainer
from qflux.models.memory_rules import CONTEXT, needed
from qflux.tools import plan_ladder
from qflux.tools.plan import make_plan, size
from qflux.tools.plan_ladder import advise, fits
from qflux.tools.plan_setup import Setup, setup_of

ROOT = Path(__file__).resolve().parents[2]


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


SIZED = {"data__target_size": [832, 576], "data__controls_size": [832, 576], "data__batch_size": 2}
FP4 = {"model__quantize": "bnb-fp4"}
SMALL = {"model__quantize_text_encoders": "bnb-nf4"}
SWAPPED = {"model__quantize": "quanto-fp8", "train__offload_blocks": 45, **SMALL}
QLORA = {"model__quantize": "bnb-nf4", "model__lora": {"r": 4}, "data__target_size": [512, 768], **SMALL}
PUBLISHED = [  # trainer, changes, published GB: the rows of "Against published figures" in docs/guide/memory.md
    ("QwenImageEdit", SIZED, 48.6),
    ("QwenImageEdit", SIZED | FP4, 22.5),
    ("FluxKontext", SIZED | {"train__mixed_precision": "fp16"}, 50),
    ("FluxKontext", SIZED | FP4, 24),
    ("QwenImage", SWAPPED, 12),
    ("Flux", QLORA, 9),
]


def test_published_figures_are_beaten_by_the_plans_that_the_guide_shows():
    page = (ROOT / "docs" / "guide" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| .+ \| ([\d.]+) GB \| ([\d.]+) GB, (.+) \|$", page)
    for (trainer, changes, published), row in zip(PUBLISHED, rows, strict=True):
        settings = {"train__gradient_checkpointing": "full", "train__optimizer": {"name": "adamw8bit"}, **changes}
        peak = plan_of(config_of(trainer, **settings)).peak
        assert row == (f"{published:g}", f"{peak.needed / 1e9:.1f}", peak.name)
        assert peak.needed < published * 1e9


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
    done = project.run(*words)
    assert done.code == 0, done.err
    assert done.foreign == []
    assert [line for line in done.out.splitlines() if line.startswith("plan: ")] == found.summary()
    run = project.newest()
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
    assert make_plan(config, import_trainer(config), datasets=[dataset]).as_dict() == found.as_dict()
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


def phase_of(found, name):
    return next(phase for phase in found.phases if phase.name == name)


def drawn(size=None, controls=(), **changes):
    sample = {"prompt": "a", "controls": list(map(str, controls))} | ({"size": size} if size else {})
    return plan_of(config_of(logging__validation={"steps": 10, "samples": [sample]}, **changes))


def test_samples_are_drawn_in_their_own_sizes(project_data):
    usual = drawn()
    assert usual.data.drawn[0].target == (1024, 1024), "the rule of the data section"
    large, small = drawn([2048, 2048]), drawn([512, 512])
    assert (large.data.drawn[0].target, small.data.drawn[0].target) == ((2048, 2048), (512, 512))
    sizes = [phase_of(found, "drawing samples").parts["activations"] for found in (small, usual, large)]
    assert sizes == sorted(set(sizes))
    assert large.phases[-3].bytes == usual.phases[-3].bytes, "the step is none the larger"
    controls = sorted((project_data.held / "control_images").glob("*.png"))[:1]
    one = drawn([512, 512], controls)
    assert len(one.data.drawn[0].controls) == 1
    assert one.data.drawn[0].tokens.image > small.data.drawn[0].tokens.image
    lost = drawn([512, 512], [project_data.held / "lost.png"])
    assert lost.data.drawn == (lost.data.shapes[0],)
    assert any(note.startswith("drawn as the training samples: sample 0: ") for note in lost.notes)


def test_the_held_out_loss_is_measured_in_the_held_out_sets_shapes(project_data):
    def held_out(path):
        validation = {"steps": 10, "held_out": str(path)}
        return plan_of(config_of(data__target_size=None, logging__validation=validation))

    here, away = held_out(project_data.held), held_out("nowhere/held")
    assert [shape.target for shape in here.data.held_out] == [(64, 64)]
    assert away.data.held_out == ()
    assert "held-out set not read: nowhere/held is not on this machine; shapes are those of training" in away.notes
    assert not any("held-out" in note for note in here.notes)
    sizes = [phase_of(found, "held-out loss").parts["activations"] for found in (here, away)]
    assert sizes[0] < sizes[1] / 10


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
    host = found.estimate.host(replace(setup, offloaded=10))
    assert host["offloaded"] > 10 * 900e6
    assert host["activations"] == 0
    assert needed(10 * GIB) > 10 * GIB + CONTEXT


@pytest.mark.parametrize("trainer", REAL)
@pytest.mark.parametrize("memory", ["80GB", "24GB", "12GB"])
def test_the_ladder_finds_a_setup_that_fits_and_no_needless_rung(trainer, memory):
    found = plan_of(config_of(trainer), memory_bytes(memory))
    advice = found.advice
    validate(found)
    assert advice.fits == (not advice.changes)
    if not advice.reached:
        assert advice.peak.needed > advice.memory
        said = " ".join(found.text().split())
        assert "is not enough, and no setting makes it so; all of this still needs" in said
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
    advice = plan_of(every, memory_bytes("40GB")).advice
    assert not {"model.quantize", "train.offload_blocks"} & {change.key for change in advice.changes}
    assert "train.optimizer.name" in {change.key for change in advice.changes}


def test_a_run_that_cannot_fit_is_refused_with_what_to_change():
    validation = {"steps": 10, "samples": [{"prompt": "a"}], "held_out": "nowhere/held"}
    found = plan_of(config_of("Flux2", logging__validation=validation))
    assert found.refusal(220 * GIB) == []
    lines = {line.partition(" needs about ")[0]: line for line in found.refusal(24 * GIB)}
    assert set(lines) == {f"memory: {phase.name}" for phase in found.phases if phase.needed > 24 * GIB}
    assert all(", the device has 24.0 GiB; " in line for line in lines.values())
    assert all(line.endswith(", or set train.memory_limit: none to try it all the same") for line in lines.values())
    encoding = lines["memory: encoding: text_encoder"]
    assert "; set model.quantize_text_encoders: quanto-fp8, or make the cache elsewhere and set" in encoding
    step = "; set train.gradient_checkpointing: full, train.optimizer.name: adamw8bit, model.quantize: bnb-nf4 and "
    assert f"{step}train.offload_blocks: " in lines["memory: training step"]
    assert ", or leave logging.validation.held_out out, or " in lines["memory: held-out loss"]
    assert ", or leave logging.validation.samples out, or " in lines["memory: drawing samples"]
    assert "; set " in lines["memory: drawing samples"]
    assert "; set " in lines["memory: held-out loss"]
    assert all("; lower data.target_size or data.batch_size, or " in line for line in found.refusal(1 * GIB))


def test_encoding_is_no_phase_of_a_run_whose_cache_is_made_elsewhere():
    names = [phase.name for phase in plan_of(config_of(cache__on_missing="refuse")).phases]
    assert names == ["training step", "saving a checkpoint"]
    uncached = plan_of(config_of(cache__on_missing="refuse", cache__use_cache=False))
    assert [phase.name for phase in uncached.phases if phase.name.startswith("encoding")]


def test_each_text_encoder_as_the_config_says():
    """By component, by one method for all, and the ladder's one in the place of both."""
    by_component = plan_of(config_of(model__quantize_text_encoders={"text_encoder_2": "bnb-nf4"}))
    held = {c.name: c.held_as for c in by_component.components}
    assert held["text_encoder"] == "bf16"
    assert held["text_encoder_2"] == "bnb-nf4, the rest bf16"
    both = plan_of(config_of(model__quantize_text_encoders="bnb-nf4"))
    sizes = [{c.name: c.bytes for c in found.components} for found in (plan_of(config_of()), by_component, both)]
    assert sizes[0]["text_encoder"] == sizes[1]["text_encoder"] > sizes[2]["text_encoder"]
    assert sizes[0]["text_encoder_2"] > sizes[1]["text_encoder_2"] == sizes[2]["text_encoder_2"]
    assert sizes[0]["transformer"] == sizes[2]["transformer"]
    estimate, setup = by_component.estimate, replace(by_component.setup, quantize_text="quanto-int8")
    assert {estimate.method(name, setup) for name in ("text_encoder", "text_encoder_2")} == {"quanto-int8"}
    assert estimate.method("vae", setup) is None
    known = [c.key for c in advise(both.estimate, both.setup, 4 * GIB).changes]
    assert "model.quantize_text_encoders" not in known, "it is so already"


def test_layers_that_the_family_keeps_are_not_quantized(monkeypatch):
    config = config_of(model__quantize="bnb-nf4")
    trainer = import_trainer(config)
    plain = make_plan(config, trainer).components[0].bytes
    monkeypatch.setattr(trainer, "family", replace(trainer.family, keep=("attn.to_q",)))
    kept = make_plan(config, trainer).components[0].bytes
    packed = 57 * (3072 * 3072 // 2 + 3072 * 3072 // 64)
    assert kept - plain == pytest.approx(57 * 2 * 3072 * 3072 - packed, rel=0.01)


def test_problems_come_with_the_plan(tmp_path):
    found = plan_of(config_of(train__offload_blocks=58, train__offload_activations=True))
    validate(found)
    assert [line.partition(":")[0] for line in found.problems] == ["train.offload_activations", "train.offload_blocks"]
    assert "found 58, expected 0 to 57" in found.problems[1]
    assert f"problem: {found.problems[1]}" in " ".join(found.text().split())
    assert plan_of(config_of(train__offload_blocks=57)).problems == ()


def test_the_limit_of_the_config_is_the_card_where_no_other_is_given():
    config = config_of(train__memory_limit="24GB")
    assert plan_of(config).advice.memory == 24 * GIB
    assert plan_of(config, 12 * GIB).advice.memory == 12 * GIB
    assert plan_of(config_of(train__memory_limit="none")).advice is None


def test_what_cannot_be_planned_says_why(tmp_path):
    with pytest.raises(UserError, match=r"nobody/nothing is no local folder, and plans know of the hub only: black-"):
        plan_of(config_of(model="nobody/nothing"))
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match=r"lacks config\.json or safetensors weights"):
        plan_of(config_of(model=str(tmp_path)))
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: 'to_z' matches no module"):
        plan_of(config_of(model__lora={"target_modules": "to_z"}))


def test_figures_for_people():
    assert [size(n) for n in (12, 2048, 3 << 20, 24 * GIB)] == ["12 B", "2.0 KiB", "3.0 MiB", "24.0 GiB"]
    text = plan_of(config_of(), memory_bytes("24GB")).text()
    assert "11.90 B" in text
    assert re.search(r"(?m)^transformer +11\.90 B +22\.2  bf16$", text)
    assert "rank 16 on 190 layers, 18.68 M parameters" in text
    assert "the first change that fits, to " in text


def test_a_setup_is_read_from_the_config():
    found = setup_of(config_of(train__gradient_checkpointing=True, train__mixed_precision="fp16"))
    assert found == Setup("fp16", "full", "adamw", True)
    more = {"train__offload_blocks": 3, "train__offload_activations": True, "model__quantize": True}
    assert setup_of(config_of(**more)) == Setup("bf16", "none", "adamw", True, "quanto-fp8", None, 3, True)
