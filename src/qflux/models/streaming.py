"""Load a network tensor by tensor: read, cast or quantize, place, free.

The host never holds more than the finished network, one tensor, and what quantizing that one needs: shards are mapped,
their pages belong to the file and go when the system wants them, and several processes share them.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qflux.errors import UserError
from qflux.io.headers import read_header
from qflux.io.places import listed
from qflux.io.quiet import quiet_imports
from qflux.models import quantize as quant
from qflux.models.loading import KEY, load_module, quiet_libraries, readable, refuse_pickles
from qflux.models.memory_rules import stored_format
from qflux.models.model_folder import read_config, shard_names

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_SHOWN = 5


def load_streaming(
    cls: type,
    folder: Path,
    component: str,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    keep: Sequence[str] = (),
    block_lists: Sequence[str] = (),
    quantize_on: torch.device | str | None = None,
    mapped: bool = False,
    **options: Any,
) -> Any:
    """Load one network as ``load_module`` does, bit for bit: frozen, in eval mode, in ``dtype``; here on ``device``.

    ``cls`` is a class of diffusers, whose files are streamed, or of transformers, whose own loader maps them and gets
    ``options``. The linear layers inside ``block_lists`` (the outermost module lists when empty) are quantized by the
    method ``quantize`` of ``qflux.models.quantize``, but for those that ``keep`` names (see ``quantize.choose``) and
    those that the class wants in fp32. Each is quantized on ``quantize_on`` (``device`` when None) before it goes to
    ``device``: a GPU is faster at it even where the weights are to stay on the host. A checkpoint that bitsandbytes
    quantized is loaded as it is. Every tensor gets memory of its own; with ``mapped`` and on the CPU those that fit
    stay in the mapped file, for a caller that soon copies every parameter elsewhere (there kernels of the CPU round
    otherwise). ``dtype`` None: as stored.
    Raises UserError for keys that are missing, unexpected or of another shape, for a quantized checkpoint where
    ``quantize`` asks for a method, and for one in another format.
    """
    config, root = read_config(folder, component), folder / component
    refuse_pickles(root)
    _refuse_formats(root, stored_format(config), quantize)
    with quiet_imports():
        from diffusers import ModelMixin
    in_fp32 = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())
    place = torch.device(device)
    works_on = torch.device(quantize_on) if quantize_on is not None else place
    plan = _Plan(dtype, place, quantize, (*keep, *in_fp32), tuple(block_lists), works_on, mapped)
    if issubclass(cls, ModelMixin):
        with readable(root, cls):
            model: Any = _skeleton(cls, config, dtype or torch.float32)
        with _Checkpoint(root) as checkpoint:
            _refuse_formats(root, "bnb-" if checkpoint.statistics else None, quantize)
            checkpoint.match(model)
            _fill(model, checkpoint, plan, in_fp32)
    else:
        late = quantize is not None and dtype == torch.bfloat16 and _can_be_cast_later(cls, root)
        model = load_module(cls, folder, component, torch.float32 if late or dtype is None else dtype, **options)
        _take_out(model, plan, dtype if late else None)
    return model.eval().requires_grad_(False)


def _refuse_formats(root: Path, found: str | None, quantize: str | None) -> None:
    if found is not None and not found.startswith("bnb-"):
        raise UserError(f"{KEY}: {root} holds weights quantized by {found}; expected plain ones or bitsandbytes'")
    if found and quantize:
        raise UserError(f"{KEY}: {root} is quantized already; set quantize to false for it, or give plain weights")


@dataclass(frozen=True)
class _Plan:
    """What to make of the tensors: quantized by ``method`` on ``works_on``, or as they are; all go to ``device``."""

    dtype: torch.dtype | None
    device: torch.device
    method: str | None
    keep: tuple[str, ...]
    block_lists: tuple[str, ...]
    works_on: torch.device
    mapped: bool = False

    def chosen(self, model: nn.Module) -> list[str]:
        """Names of the layers to quantize."""
        return quant.choose(model, self.method, self.block_lists, self.keep)[0] if self.method else []

    def quantizer(self, dtype: torch.dtype | None) -> quant.Quantizer:
        """What makes the quantized layers; weights are cast to ``dtype`` first, if it is not None."""
        return quant.Quantizer(str(self.method), dtype, self.works_on, self.device)

    def own(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy in memory of its own, on the device; floating-point numbers in ``dtype``, the base's when None.

        In a mapped file tensors may lie unaligned, where kernels of the CPU round otherwise.
        """
        wanted = (dtype or self.dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, wanted, copy=True)

    def value(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """What a network gets of a file's tensor: a copy, or the tensor itself where it may stay mapped and fits."""
        fits = (dtype or self.dtype) in (None, tensor.dtype) and self.device.type == "cpu"
        return tensor if self.mapped and fits else self.own(tensor, dtype)


class _Checkpoint:
    """The safetensors files of a component, mapped; to be used in a ``with`` block.

    names       name in the network → key in the files
    statistics  layer → part → key, of the weights that bitsandbytes quantized
    """

    def __init__(self, root: Path) -> None:
        self.root, self._files = root, ExitStack()
        self.names: dict[str, str] = {}
        self.statistics: dict[str, dict[str, str]] = {}
        self._shard_of: dict[str, Any] = {}

    def __enter__(self) -> _Checkpoint:
        with quiet_imports():
            from safetensors import SafetensorError, safe_open
        for path in self._paths():
            try:
                read_header(path)  # its limits are narrower than the library's
                shard = self._files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError, UserError) as error:
                self._files.close()
                raise UserError(f"{KEY}: {path} cannot be read: {' '.join(str(error).split())}") from None
            for key in shard.offset_keys():  # in the order of their bytes
                self._shard_of[key] = shard
                part = quant.part_of(key)
                if part is None:
                    self.names[key] = key
                else:
                    self.statistics.setdefault(part[0], {})[part[1]] = key
        return self

    def __exit__(self, *_: object) -> None:
        self._shard_of.clear()
        self._files.close()

    def _paths(self) -> list[Path]:
        names, index = {_WEIGHTS}, self.root / _INDEX
        if index.is_file():
            names = set(shard_names(index))
        missing = [name for name in sorted(names) if not (self.root / name).is_file()]
        if missing:
            raise UserError(f"{KEY}: {self.root} lacks {listed(missing, _SHOWN)}")
        return [self.root / name for name in sorted(names)]

    def tensor(self, key: str) -> Tensor:
        """A tensor as it lies in the mapped file."""
        return self._shard_of[key].get_tensor(key)

    def match(self, model: Any) -> None:
        """Bring names and shapes together with the network's; UserError with all that differ."""
        model._fix_state_dict_keys_on_load(self.names)  # attention layers in files of old autoencoders
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in [name for name in self.names if any(re.search(pattern, name) for pattern in ignored)]:
            del self.names[name]
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        packed = {f"{layer}.weight" for layer in self.statistics}
        other = []
        for name in sorted(self.names.keys() & shapes.keys() - packed):
            found = self._shard_of[self.names[name]].get_slice(self.names[name]).get_shape()
            if found != shapes[name]:
                other.append(f"{name} {found} where the network has {shapes[name]}")
        lacking = sorted((shapes.keys() | packed) - self.names.keys())
        unknown = sorted(self.names.keys() - shapes.keys())
        told = (("lacks", lacking), ("has unexpected", unknown), ("has other shapes:", other))
        problems = [f"{KEY}: {self.root} {what} {listed(names, _SHOWN)}" for what, names in told if names]
        if problems:
            raise UserError(*problems)


def _skeleton(cls: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The network with its parameters on the meta device; buffers and tables are as the constructor makes them."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with quiet_libraries(), _parameters_on_meta(), torch.random.fork_rng(devices=[]):
            return cls.from_config(plain)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While inside, a module's parameter is on the meta device from the moment it is registered.

    ``torch.device("meta")`` would take the tables that no checkpoint holds too. Memory that is never written is never
    given by the system, so the constructors' empty tensors cost nothing before.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, None if value is None else nn.Parameter(value.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fill(model: nn.Module, checkpoint: _Checkpoint, plan: _Plan, in_fp32: Sequence[str]) -> None:
    """Give every parameter and buffer its value; each tensor is read, used and let go."""
    chosen, make = frozenset(plan.chosen(model)), plan.quantizer(plan.dtype)
    for name, key in checkpoint.names.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and layer in checkpoint.statistics:
            quant.replace(model, layer, _restored(model.get_submodule(layer), layer, checkpoint, plan))
        elif last == "weight" and layer in chosen:
            linear: Any = model.get_submodule(layer)
            quant.replace(model, layer, make(linear, checkpoint.tensor(key)))
            _trim()
        else:
            dtype = torch.float32 if any(part in name.split(".") for part in in_fp32) else plan.dtype
            _place(model.get_submodule(layer), last, plan.value(checkpoint.tensor(key), dtype))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(plan.device)


def _trim() -> None:
    """Give freed memory back to the system: on Linux the C library keeps holes between what stays for a later use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _restored(linear: Any, layer: str, checkpoint: _Checkpoint, plan: _Plan) -> Any:
    keys = {"weight": checkpoint.names[f"{layer}.weight"], **checkpoint.statistics[layer]}
    parts = {part: checkpoint.tensor(key).to(plan.device, copy=True) for part, key in keys.items()}
    try:
        return quant.restored(linear, parts, plan.dtype or torch.float32)
    except UserError as error:
        raise UserError(f"{KEY}: {checkpoint.root}: {layer}: {error}") from None


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def _can_be_cast_later(cls: Any, root: Path) -> bool:
    """May a network of transformers come in fp32, its pages the file's, and each weight be cast as it is quantized?

    transformers itself casts all of them at once, which would hold the whole network in the wanted dtype beside the
    quantized one. Only where all files are in fp32, and nothing is to stay in it in a network of bf16.
    """
    with quiet_imports():
        from safetensors import SafetensorError, safe_open
    if getattr(cls, "_keep_in_fp32_modules_strict", None):
        return False
    try:
        for path in root.glob("*.safetensors"):
            with safe_open(path, framework="pt") as shard:
                if any(shard.get_slice(key).get_dtype() != "F32" for key in shard.offset_keys()):
                    return False
    except (SafetensorError, OSError):
        return False  # its own loader tells what is wrong
    return True


def _take_out(model: Any, plan: _Plan, dtype: torch.dtype | None) -> None:
    """Quantize what is to be, and take all tensors of a loaded network out of the mapped files; ties stay ties.

    Parameters are cast to ``dtype`` if it is not None; buffers are in the dtype that they need already.
    """
    for name, layer in quant.foreign_layers(model).items():
        parts = {key.removeprefix("weight."): value for key, value in layer.state_dict().items() if key != "bias"}
        parts = {part: value.to(plan.device, copy=True) for part, value in parts.items()}
        quant.replace(model, name, quant.restored(layer, parts, plan.dtype or torch.float32))
    make = plan.quantizer(dtype)
    for name in plan.chosen(model):
        linear: Any = model.get_submodule(name)
        quant.replace(model, name, make(linear))
        _trim()
    for value in [value for value in model.parameters() if type(value) is nn.Parameter]:
        value.data = plan.own(value.data, dtype or value.dtype)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else plan.own(buffer, buffer.dtype)
        if dtype is not None and hasattr(module, "config"):
            module.config.dtype = dtype
