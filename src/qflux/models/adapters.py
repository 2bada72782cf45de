"""Adapters (LoRA, DoRA) through PEFT, and their file; full training of a network at the end.

The adapter file carries the keys and the metadata that the official pipelines write and read, so that rank, alpha and
DoRA survive ``load_lora_weights``. Its bytes depend on the weights and the given information only.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qflux.errors import UserError
from qflux.io.atomic import write_json
from qflux.io.headers import unreadable
from qflux.io.json_files import strict_loads, strict_read
from qflux.io.places import listed
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import load_tensors, read_metadata, save_tensors
from qflux.models.native_names import METADATA_KEY
from qflux.models.quantized_layers import Quantized
from qflux.models.targets import KEY, select_targets
from qflux.randomness import Purpose, generator
from qflux.types import Family

ADAPTER = "default"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
FULL_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_SHOWN = 5
_PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.")


def resolve_targets(model: nn.Module, targets: str | Sequence[str], family: Family) -> list[str]:
    """Full names of the linear modules that ``targets`` selects, sorted; see ``select_targets``."""
    named = ((name, module) for name, module in model.named_modules() if name)
    kinds = {name: None if isinstance(module, nn.Linear) else type(module).__name__ for name, module in named}
    return select_targets(kinds, targets, family)


def add_adapter(model: Any, lora_config: Any, family: Family, seed: int) -> list[str]:
    """Freeze ``model``, put an fp32 adapter on the modules the config selects, and return their names, sorted.

    A is drawn from a generator of its own for each module, B is zero: the start depends on ``seed`` and the module's
    place in the sorted list only, and no global random state is read or moved. ``gaussian``: A of standard deviation
    1/r; else uniform in ±1/√(in features). DoRA's magnitude is the fp32 norm of the base weight.
    """
    with quiet_imports():
        from peft import LoraConfig

    names = resolve_targets(model, lora_config.target_modules, family)
    gaussian = lora_config.init_lora_weights == "gaussian"
    peft_config = LoraConfig(
        r=lora_config.r,
        lora_alpha=lora_config.lora_alpha,
        target_modules=_peft_targets(names, [name for name, _ in model.named_modules()]),
        init_lora_weights="gaussian" if gaussian else True,
        use_dora=bool(lora_config.use_dora),
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(peft_config, adapter_name=ADAPTER)
    for index, name in enumerate(names):
        _initialise(model.get_submodule(name), gaussian, generator(seed, Purpose.INIT, 0, index))
    return names


def _peft_targets(names: Sequence[str], every: Sequence[str]) -> list[str] | str:
    """``names`` for PEFT, which matches endings: an expression where an ending would select more than was asked."""
    wanted = set(names)
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name in every if name not in wanted):
        return "|".join(re.escape(name) for name in names)
    return list(names)


def _initialise(layer: Any, gaussian: bool, draw: torch.Generator) -> None:
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        if ADAPTER in part:
            part[ADAPTER].to(torch.float32)
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    start = torch.empty(a.shape, dtype=torch.float32)
    if gaussian:
        start.normal_(0.0, 1.0 / a.shape[0], generator=draw)
    else:
        bound = 1.0 / math.sqrt(a.shape[1])
        start.uniform_(-bound, bound, generator=draw)
    with torch.no_grad():
        a.copy_(start)
        b.zero_()
    if ADAPTER in layer.lora_magnitude_vector:
        # On a 16-bit base PEFT rounds the norm; against the fp32 norm of the forward that would already bend the base.
        layer.lora_magnitude_vector[ADAPTER].update_layer(
            base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=layer.scaling[ADAPTER]
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything that is trained, sorted by name."""
    return {name: param for name, param in sorted(model.named_parameters()) if param.requires_grad}


def adapter_state(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors by their saved names (without the adapter's own name), fp32 on the CPU.

    ``values`` are other values of the trained parameters, by their names in the model.
    """
    with quiet_imports():
        from peft import get_peft_model_state_dict
    given = None if values is None else dict(values)
    state = get_peft_model_state_dict(model, given, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: state[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(state)}


def adapter_metadata(model: Any, prefix: str) -> str:
    """The adapter's config as the official loader wants it: JSON, each key with the component's prefix, sets sorted."""
    config = model.peft_config[ADAPTER].to_dict()
    plain = {f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True)


def save_adapter(
    target: Path,
    model: nn.Module,
    *,
    family: Family,
    info: Mapping[str, str],
    values: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter to ``target`` (a ``.safetensors`` file, or the folder that gets one) and return the file.

    ``info`` is added to the metadata as strings; it should hold no path, prompt or time. ``values`` as in
    ``adapter_state``.
    """
    path = target if target.suffix == ".safetensors" else target / WEIGHTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{family.denoiser}.{name}": value for name, value in adapter_state(model, values).items()}
    metadata = {**info, "format": "pt", METADATA_KEY: adapter_metadata(model, family.denoiser)}
    save_tensors(path, tensors, metadata)
    return path


def _plain_names(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the model's names: the component prefixes of other writers are taken off."""

    def plain(name: str) -> str:
        candidates = [name, *(name.removeprefix(prefix) for prefix in _PREFIXES)]
        candidates += [candidate.removesuffix(".weight") for candidate in candidates]
        return next((candidate for candidate in candidates if candidate in known), name)

    return {plain(name): value for name, value in tensors.items()}


def verify_adapter(path: Path, model: nn.Module, values: Mapping[str, Tensor] | None = None) -> tuple[int, int]:
    """Read an adapter file back: (tensors equal to the model's in name, shape and bits; tensors the model has)."""
    state = adapter_state(model, values)
    saved = _plain_names(load_tensors(path), state)
    return sum(name in saved and torch.equal(saved[name], value) for name, value in state.items()), len(state)


def load_adapter(path: Path, model: Any) -> tuple[int, int]:
    """Fill the model's adapter from a file or a folder with diffusers or PEFT keys; (matched, total), always equal.

    Raises UserError when a tensor is missing, unexpected or of another shape, or when the file's alpha / rank differs
    from the model's: the same tensors would then be another adapter.
    """
    own, values = dict(model.named_parameters()), read_adapter(path, model)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return len(values), len(values)


def read_adapter(path: Path, model: Any, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Name of the model's parameter → tensor of an adapter file; refused as ``load_adapter`` says.

    ``values`` are the model's trained parameters where they are not whole in it.
    """
    path = _adapter_file(path)
    state = adapter_state(model, values)
    found = _plain_names(load_tensors(path), state)
    _refuse_mismatch(path, found, state)
    _refuse_other_scaling(path, model)
    return {_full_name(name): value for name, value in found.items()}


def _full_name(name: str) -> str:
    stem, dot, last = name.rpartition(".")
    return f"{name}.{ADAPTER}.weight" if last == "lora_magnitude_vector" else f"{stem}.{ADAPTER}{dot}{last}"


def _adapter_file(path: Path) -> Path:
    names = (WEIGHTS_FILE, "adapter_model.safetensors")
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), path / WEIGHTS_FILE)
    if not path.is_file():
        raise UserError(f"no adapter file {path}; expected a .safetensors file or a folder with {' or '.join(names)}")
    if path.suffix != ".safetensors":
        raise unreadable(path, ValueError("adapters are read from .safetensors only"))
    return path


def _refuse_mismatch(path: Path, found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    if not found.keys() & state.keys():
        example = f"; the file has e.g. {min(found)}, the model {min(state)}" if found and state else ""
        raise UserError(f"{path}: 0 of {len(state)} adapter tensors match{example}; is it for another model?")
    problems = []
    for what, names in (("lacks", state.keys() - found.keys()), ("has unexpected", found.keys() - state.keys())):
        if names:
            problems.append(f"{path}: {what} {listed(sorted(names), _SHOWN)}; check {KEY}")
    wrong = [name for name in sorted(found.keys() & state.keys()) if found[name].shape != state[name].shape]
    if wrong:
        first = wrong[0]
        problems.append(
            f"{path}: {len(wrong)} tensors have another shape, e.g. {first} {list(found[first].shape)} in the file, "
            f"{list(state[first].shape)} in the model; check model.lora.r"
        )
    if problems:
        raise UserError(*problems)


def _refuse_other_scaling(path: Path, model: Any) -> None:
    config = model.peft_config[ADAPTER]
    wanted = config.lora_alpha / config.r
    saved = saved_config(path)
    alpha, rank = saved.get("lora_alpha"), saved.get("r")
    if not all(value is None or (type(value) in (int, float) and value > 0) for value in (alpha, rank)):
        raise UserError(f"{path}: its LoRA config has r {rank!a} and lora_alpha {alpha!a}, expected numbers above 0")
    found = alpha / (math.sqrt(rank) if saved.get("use_rslora") else rank) if alpha and rank else 1.0
    if not math.isclose(found, wanted):
        told = f"alpha {alpha} and rank {rank}" if alpha and rank else "no alpha, which means alpha = rank"
        raise UserError(
            f"{path}: the file has {told}, the config {config.lora_alpha} and {config.r}; "
            f"set model.lora.lora_alpha: {found * config.r:g}"
        )


def saved_config(path: Path) -> dict[str, Any]:
    """The LoRA config that came with an adapter file: its metadata, or PEFT's file beside it; empty if neither.

    Its names are without the component's prefix. UserError where it cannot be read.
    """
    text = read_metadata(path).get(METADATA_KEY)
    beside = path.with_name("adapter_config.json")
    try:
        config = strict_loads(text.encode()) if text else strict_read(beside) if beside.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the LoRA config that came with it cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: the LoRA config that came with it is no JSON object")
    return {key.rpartition(".")[2]: value for key, value in config.items()}


@contextlib.contextmanager
def rounded_copy(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While inside, the adapter is what ``load_lora_weights`` gives a user whose base is of ``dtype``.

    That loader casts each adapter tensor to the dtype of the layer it sits on (layers kept in fp32 keep an fp32
    adapter, quantized ones with integer weights the file's fp32). fp32 changes nothing. The trained parameters are put
    aside, not copied back, so nothing drifts; an optimizer step inside would be lost.
    """
    with quiet_imports():
        from peft.tuners.tuners_utils import BaseTunerLayer

    swapped: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)] if dtype != torch.float32 else []
    try:
        for layer in layers:
            plain: Any = layer.get_base_layer()
            base = plain.weight_dtype if isinstance(plain, Quantized) else plain.weight.dtype
            for owner, name, param in _adapter_parameters(layer):
                swapped.append((owner, name, param))
                cast = param.detach().to(base) if base.is_floating_point else param.detach()
                owner._parameters[name] = nn.Parameter(cast, requires_grad=False)
        yield
    finally:
        for owner, name, original in swapped:
            owner._parameters[name] = original


def _adapter_parameters(layer: Any) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for part in dict.fromkeys(layer.adapter_layer_names):  # PEFT lists DoRA's vector twice
        holder = getattr(layer, part)
        if ADAPTER not in holder:
            continue
        for owner in holder[ADAPTER].modules():
            yield from ((owner, name, param) for name, param in list(owner._parameters.items()) if param is not None)


def _own_memory(model: nn.Module) -> None:
    """Take parameters out of a mapped file: there they may lie unaligned, and CPU kernels round otherwise then."""
    for param in model.parameters():
        param.data = param.data.clone()


def prepare_full(model: nn.Module) -> list[str]:
    """Train every parameter of the network, in fp32; returns their names, sorted."""
    _own_memory(model.to(torch.float32).requires_grad_(True))
    return sorted(name for name, _ in model.named_parameters())


def save_full(
    folder: Path, model: Any, component: str = "transformer", values: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the whole network as ``folder/component/``, as ``from_pretrained`` opens it; returns that folder.

    ``values`` are other values of parameters, by name.
    """
    held = {**model.state_dict(), **(values or {})}
    target = folder / component
    target.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in held.items()}
    save_tensors(target / FULL_WEIGHTS_FILE, state, {"format": "pt"})
    config = json.loads(model.to_json_string())
    write_json(target / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})
    return target


def load_full(folder: Path, model: Any, component: str = "transformer") -> None:
    """Put the weights that ``save_full`` wrote back into the network, all of them.

    Raises UserError where the file is missing, or its tensors are not the network's in name and shape.
    """
    path = folder / component / FULL_WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"no weights {path}; with model.lora: null expected a checkpoint of full training")
    found, state = load_tensors(path), model.state_dict()
    problems = []
    for what, names in (("lacks", state.keys() - found.keys()), ("has unexpected", found.keys() - state.keys())):
        if names:
            problems.append(f"{path}: {what} {listed(sorted(names), _SHOWN)}; is it of another model?")
    wrong = {name for name in found.keys() & state.keys() if found[name].shape != state[name].shape}
    if wrong:
        first = min(wrong)
        problems.append(
            f"{path}: {len(wrong)} tensors have another shape, e.g. {first} {list(found[first].shape)} in the file, "
            f"{list(state[first].shape)} in the model; is it of another model?"
        )
    if problems:
        raise UserError(*problems)
    _own_memory(model)
    model.load_state_dict(found, strict=True)
