"""Text encoders loaded without the layers that nobody reads: the same embeddings, bit for bit, from fewer weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qflux.demo import DEMOS
from qflux.io.digests import DigestMemo, canonical_json
from qflux.io.quiet import quiet_imports
from qflux.models.loading import quiet_libraries
from qflux.tools import plan_data
from qflux.trainer.encoding import cache_manager
from qflux.trainer.flux2_trainer import Flux2KleinTrainer, Flux2Trainer
from qflux.types import EditSample, Resize, SizePlan

with quiet_imports():
    from diffusers import Flux2KleinPipeline, Flux2Pipeline
    from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

PROMPTS = ("make the circle red", "", "make the background of the big square blue and remove the small shape")
PLAN = SizePlan(Resize((0.0, 0.0, 64.0, 64.0), (64, 64)))
WIDTH = 16  # of the tiny encoders; an embedding is three layers of it side by side


@dataclass(frozen=True)
class Kind:
    """One text encoder: the trainer that truncates it, transformers' class, the last hidden state that is read."""

    model: str
    trainer: type[Flux2Trainer]
    encoder: Any
    pipeline: Any
    last: int

    def whole(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The encoder as a user of the official pipeline loads it; ``.to(bf16)`` would round its rotary buffers too."""
        with quiet_libraries():
            return self.encoder.from_pretrained(folder, subfolder="text_encoder", dtype=dtype).eval()


KINDS = [
    Kind("flux2", Flux2Trainer, Mistral3ForConditionalGeneration, Flux2Pipeline, 30),
    Kind("flux2_klein", Flux2KleinTrainer, Qwen3ForCausalLM, Flux2KleinPipeline, 27),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["mistral3", "qwen3"])


def layers_of(encoder: Any) -> Any:
    """The list of a text encoder's layers."""
    return encoder.get_decoder().layers


def size_of(module: Any) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def trainers_embeddings(trainer: Any, encoder: Any) -> torch.Tensor:
    """``[3, L, D]`` by the trainer's own hook."""
    parts = {"text_encoder": encoder, "tokenizer": trainer.load("tokenizer")}
    samples = [EditSample(None, [], prompt, None, "0", "", PLAN) for prompt in PROMPTS]
    return torch.stack([trainer.encode(parts, sample).text["prompt_embeds"] for sample in samples])


@torch.no_grad()
def pipelines_embeddings(kind: Kind, trainer: Any, encoder: Any) -> torch.Tensor:
    """The same by the official pipeline, prompt by prompt."""
    pipe = kind.pipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=encoder, tokenizer=trainer.load("tokenizer")
    )
    length = trainer.text_length
    return torch.cat([pipe.encode_prompt(prompt, max_sequence_length=length)[0] for prompt in PROMPTS])


@each_kind
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fewer_layers_give_the_same_embeddings(tiny: Callable[[str], Any], kind: Kind, precision: str) -> None:
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    trainer = tiny(kind.model).make(f"train.mixed_precision={precision}")
    trainer.dtype = dtype
    whole, cut = kind.whole(trainer.folder, dtype), trainer.load("text_encoder")
    assert len(layers_of(whole)) > len(layers_of(cut)) == kind.last + 1
    dropped = sum(size_of(layer) for layer in layers_of(whole)[kind.last + 1 :])
    assert size_of(cut) == size_of(whole) - dropped
    found = trainers_embeddings(trainer, cut)
    assert found.dtype == dtype
    assert torch.equal(found, pipelines_embeddings(kind, trainer, whole))
    assert not torch.equal(found[0], found[2])


@each_kind
def test_one_layer_less_would_be_normalised(tiny: Callable[[str], Any], kind: Kind) -> None:
    """With exactly as many layers as the last one read, its hidden state comes out behind the final norm."""
    trainer = tiny(kind.model).make()
    expected = pipelines_embeddings(kind, trainer, kind.whole(trainer.folder))
    trainer.text_layers = kind.last
    encoder = trainer.load("text_encoder")
    assert len(layers_of(encoder)) == kind.last
    found = trainers_embeddings(trainer, encoder)
    same, last = slice(0, 2 * WIDTH), slice(2 * WIDTH, None)
    assert torch.equal(found[..., same], expected[..., same])
    assert (found[..., last] - expected[..., last]).norm() > 0.1 * expected[..., last].norm()
    norm = encoder.get_decoder().norm
    with torch.no_grad():
        assert torch.allclose(norm(expected[..., last]), found[..., last], atol=1e-5)


@pytest.mark.parametrize("name", [name for name, demo in DEMOS.items() if demo.cuts])
def test_a_stage_says_whether_its_text_has_the_configs_length(tiny: Callable[[str], Any], name: str) -> None:
    """What does not is not made again for another ``data.max_sequence_length``; it must be the same then."""
    shorter, longer = (tiny(name).make(f"data.max_sequence_length={length}") for length in (24, 40))
    sample = EditSample(None, [], " ".join(PROMPTS * 8), None, "0", "", PLAN)  # longer than both
    for stage in shorter.family.stages:
        if stage.kind == "image":
            continue
        parts = {component: shorter.load(component) for component in stage.components}
        with torch.no_grad():
            few, many = (trainer.encode(parts, sample).text for trainer in (shorter, longer))
        same = {tensor.shape == many[key].shape and torch.equal(tensor, many[key]) for key, tensor in few.items()}
        assert same == {not stage.text_length}, stage.name


@pytest.mark.parametrize("name", DEMOS)
def test_the_plans_recipes_are_the_caches(tiny: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    """Names in them and their length in an entry's header."""
    trainer = tiny(name).make()
    made = cache_manager(trainer, DigestMemo(tmp_path / "memo.json")).recipes
    for stage in trainer.family.stages:
        planned = plan_data._recipe(trainer.config, trainer.family, stage, 4)
        assert planned.keys() == json.loads(made[stage.name]).keys()
        assert len(canonical_json(planned)) == len(made[stage.name])


@each_kind
def test_a_shallow_checkpoint_is_loaded_whole(tiny: Callable[[str], Any], kind: Kind, tmp_path: Path) -> None:
    trainer = tiny(kind.model).make()
    small = kind.whole(trainer.folder)
    config = small.config.get_text_config()
    del layers_of(small)[5:]
    config.num_hidden_layers = 5
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:5]
    folder = shutil.copytree(trainer.folder, tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder"))
    with quiet_libraries():
        small.save_pretrained(folder / "text_encoder")
    shallow = kind.trainer(trainer.config, folder, dtype=torch.float32, device=torch.device("cpu"))
    loaded = shallow.load("text_encoder")
    assert len(layers_of(loaded)) == 5
    saved, found = small.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in saved.items())


@each_kind
def test_the_file_is_left_as_it_is(tiny: Callable[[str], Any], kind: Kind) -> None:
    """Truncation is in memory: config and class on disk still name every layer, and a cut encoder is frozen."""
    trainer = tiny(kind.model).make()
    cut = trainer.load("text_encoder")
    assert isinstance(cut, kind.encoder)
    assert not cut.training
    assert not any(parameter.requires_grad for parameter in cut.parameters())
    stored = json.loads((trainer.folder / "text_encoder" / "config.json").read_text())
    assert stored.get("text_config", stored)["num_hidden_layers"] > cut.config.get_text_config().num_hidden_layers
