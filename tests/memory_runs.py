"""Every family's tiny model in a project of its own, one optimizer step of it in this process, what a base stores.

For the tests of quantized bases, recomputation and offloading: two pairs of 64 x 64 in bf16, an adapter of rank 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import draw
from tiny_project import PROMPT, WEIGHTS, Data, Outcome, Project
from torch import Tensor, nn

from qflux.config import load_config
from qflux.data.feeder import collate
from qflux.demo import DEMOS, shapes
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors, save_tensors
from qflux.main import import_trainer
from qflux.models import quantize
from qflux.models.loading import load_module
from qflux.models.memory_rules import matches, packed_bytes, unfit
from qflux.parallel.group import Group
from qflux.parallel.placement import Placement, Seat
from qflux.runtime.signals import StopSignal
from qflux.trainer import setup
from qflux.trainer.base_trainer import BaseTrainer
from qflux.trainer.early import memo_of
from qflux.trainer.encoding import SampleReader, cache_manager, ensure_cached
from qflux.types import Batch, Family

FAMILIES = tuple(DEMOS)
DTYPES = {
    **dict.fromkeys(("bnb-nf4", "bnb-fp4", "quanto-int4", "quanto-int2"), torch.uint8),
    **dict.fromkeys(("bnb-int8", "quanto-int8"), torch.int8),
    "quanto-fp8": torch.float8_e4m3fn,
}
DENOISER = "transformer"
_WAITING = r"\d+ blocks wait in host memory \(.+ GiB\), \d+ stay"


def family_project(one: Any, root: Path, captured: Any, **changes: Any) -> Project:
    """A project on the family ``one`` of the fixture ``tiny``: a run of 2 steps of one pair, samples of 2 steps.

    ``changes`` are sections with changed keys. Pairs and cache are shared by all projects of the family.
    """
    demo, home = DEMOS[one.name], one.config_file.parent
    pairs = home / "pairs"
    if not pairs.is_dir():
        shapes.write_pairs(pairs, 2, 0, controls=demo.edits)
        (pairs / "training_images" / "00001.txt").write_text("a caption of another length")
    project = Project(root, home / "model", Data(pairs, pairs, pairs), home / "pairs_cache", captured)
    controls = [str(pairs / "control_images" / "00000.png")] if demo.edits else []
    sample = {"prompt": PROMPT, "controls": controls, "size": [64, 64]}
    tree: dict[str, dict[str, Any]] = {
        "model": {"lora": {"r": 2}},
        "data": {"batch_size": 1, "max_sequence_length": 24 if demo.cuts else None},
        "train": {
            "trainer": demo.trainer,
            "mixed_precision": "bf16",
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "sigma": {"shift": "none"},
        },
        "logging": {"validation": {"num_inference_steps": 2, "samples": [sample]}},
    }
    for section, values in changes.items():
        tree[section] |= values
    project.write({f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()})
    return project


def train(project: Project, *words: object, name: str = "tiny") -> Path:
    """``Project.train`` where blocks may be offloaded, which is told; the run's folder."""
    done = project.run(*words, f"logging.tracker_project_name={name}")
    assert done.code == 0, done.out + done.err
    assert [line for line in done.foreign if not re.fullmatch(_WAITING, line)] == []
    assert "sampling: stopped" not in done.out
    return project.newest(name)


def refused(project: Project, *words: object) -> str:
    """A run that must end in exit code 2 with one line, before anything is planned, encoded or written; the line."""
    cache = project.root / "new_cache"
    done: Outcome = project.run(*words, f"cache.cache_dir={cache}")
    assert done.code == 2, done
    assert len(done.err.splitlines()) == 1, done.err
    assert len(done.out.splitlines()) <= 1, "only what is to be done may be said"
    assert not list(cache.rglob("*.safetensors"))
    assert not (project.root / "runs").exists()
    return done.err


def trainer_of(project: Project, *overrides: str) -> Any:
    """The trainer that a run of ``project`` makes."""
    config = load_config(project.config, overrides)
    dtype = torch.float32 if config.model.lora is None else torch.bfloat16
    return import_trainer(config)(config, project.model, dtype=dtype, device=torch.device("cpu"))


def keys_of(trainer: Any) -> list[dict[str, str]]:
    """Stage → key of the cache's entry, of each sample."""
    cache = cache_manager(trainer, memo_of(trainer.config))
    return [cache.keys(spec) for spec in setup.open_datasets(trainer)[0].specs if spec is not None]


def batch_of(trainer: Any) -> Batch:
    """Both pairs as one batch, through the cache."""
    (dataset,), cache = setup.open_datasets(trainer), cache_manager(trainer, memo_of(trainer.config))
    ensure_cached(trainer, cache, dataset, StopSignal())
    reader, positions = SampleReader(trainer, dataset, cache), [(0, 0), (0, 1)]
    return collate([reader.read(*position) for position in positions], positions)


def on_cpu(trainer: Any) -> Placement:
    """A placement for one step, also where there is a GPU."""
    return Placement(trainer.config, trainer.family, Seat(torch.device("cpu"), 0, 1), Group())


def one_step(trainer: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(each sample's loss, name → gradient) of a step as a run prepares it; see ``tiny_networks.assert_same``.

    Adapters have left their start, at which half of their gradients are zero.
    """
    called, weights = setup.make_weights(trainer, on_cpu(trainer), 2)
    with torch.no_grad():
        for name, param in weights.params.items():
            if "lora_B" in name:
                param.copy_(draw(*param.shape) * 0.1)
    losses = trainer.step(called, batch, 7, 1.0)
    losses.mean().backward()
    return losses.detach(), {name: param.grad for name, param in weights.params.items()}


@dataclass
class Loads:
    """What networks the trainers loaded: (component, module) in order."""

    seen: list[tuple[str, Any]]

    @classmethod
    def watched(cls, monkeypatch: pytest.MonkeyPatch) -> Loads:
        """From now on."""
        found, original = cls([]), BaseTrainer.load_network

        def load(self: Any, kind: type, component: str, **options: Any) -> Any:
            module = original(self, kind, component, **options)
            found.seen.append((component, module))
            return module

        monkeypatch.setattr(BaseTrainer, "load_network", load)
        return found

    def of(self, *components: str) -> list[Any]:
        """The modules of these components."""
        return [module for name, module in self.seen if name in components]


def swapped(plain: nn.Module, method: str, family: Family) -> dict[str, tuple[torch.dtype, int]]:
    """What ``quantize.stored`` must tell of the network ``plain`` when it is loaded by ``method`` on a bf16 base."""
    inside = tuple(f"{name}." for name in family.block_lists)
    return {
        name: (DTYPES[method], packed_bytes(method, part.out_features, part.in_features))
        for name, part in plain.named_modules()
        if isinstance(part, nn.Linear)
        and name.startswith(inside)
        and not matches(name, family.keep)
        and unfit(method, part.out_features, part.in_features) is None
    }


def assert_quantized(model: nn.Module, method: str, plain: nn.Module, family: Family) -> None:
    """Every linear layer in the blocks is stored by ``method`` and in nothing else; the rest bf16, adapters fp32.

    ``plain`` is the same network loaded without a method.
    """
    expected = swapped(plain, method, family)
    assert expected
    assert quantize.stored(model) == expected
    layers = quantize.quantized_layers(model)
    for name, layer in layers.items():
        numbers = layer.packed().get("weight", layer.packed().get("data"))
        assert numbers.view(DTYPES[method]).dtype == DTYPES[method], name
        assert numbers.dtype in (DTYPES[method], torch.uint8), name
        assert reachable_bytes(layer) == expected[name][1] + (0 if layer.bias is None else layer.bias.nbytes), name
    assert_plain(model, plain, expected)


def assert_plain(model: nn.Module, plain: nn.Module, but: Collection[str]) -> None:
    """All parameters but the weights of the layers ``but`` are those of ``plain`` in bf16; adapters are fp32."""
    found = {name.replace(".base_layer.", "."): value for name, value in model.named_parameters()}
    assert {value.dtype for name, value in found.items() if "lora_" in name} <= {torch.float32}
    for name, value in plain.named_parameters():
        if name.removesuffix(".weight") not in but:
            assert found[name].dtype == torch.bfloat16, name
            assert torch.equal(found[name], value.bfloat16()), name


def reachable_bytes(layer: nn.Module) -> int:
    """Bytes of all tensors that a layer holds in any attribute, also in those of its objects, each memory once."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen or isinstance(value, type):
            return
        seen.add(id(value))
        if isinstance(value, Tensor) and value.numel():
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        if isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            for item in value:
                visit(item)
        elif (hasattr(value, "__dict__") and not callable(value)) or isinstance(value, nn.Module):
            visit(vars(value))

    visit(layer)
    return sum(found.values())


def adapter(run: Path, step: int) -> dict[str, Tensor]:
    """The adapter's tensors saved after ``step``."""
    return load_tensors(run / f"checkpoint-{step:06d}" / WEIGHTS)


def write_prequantized(root: Path, method: str, block_lists: Sequence[str]) -> None:
    """Quantize a diffusers network's folder in place as diffusers saves it, by bitsandbytes alone."""
    with quiet_imports():
        import bitsandbytes as bnb
        import diffusers
    config = json.loads((root / "config.json").read_text())
    model = load_module(getattr(diffusers, config["_class_name"]), root.parent, root.name, torch.bfloat16)
    for name, part in list(model.named_modules()):
        if not isinstance(part, nn.Linear) or name.split(".")[0] not in block_lists:
            continue
        sizes, has_bias = (part.in_features, part.out_features), part.bias is not None
        if method == "bnb-int8":
            layer = bnb.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, has_bias, torch.bfloat16, quant_type=method.removeprefix("bnb-"))
        layer.load_state_dict(part.state_dict())
        layer.bias = part.bias
        quantize.replace(model, name, layer.bfloat16().to("cpu"))
    for file in root.glob("*.safetensors*"):
        file.unlink()
    save_tensors(root / "diffusion_pytorch_model.safetensors", model.state_dict(), {"format": "pt"})
    kind = {"load_in_8bit": True} if method == "bnb-int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": method[4:]}
    others = [name for name, _ in model.named_children() if name not in block_lists]
    told = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": others, **kind}
    (root / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
