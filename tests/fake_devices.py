"""Accelerators by name only: what a network over several devices does, on a machine that has none.

Every tensor lies on ``base`` and carries the device that it is said to be on: ``cpu`` computes real numbers, ``meta``
shapes only, so that networks of any size run in seconds. As on real devices an operation on tensors of two of them
fails where it stands, results lie where their operands do, and a copy is differentiable: its gradient travels back.
What is sent to the host without waiting is not there until somebody waits. Unlike a backend of its own nothing is
registered with torch: outside of ``with`` all is as before.

    with FakeDevices("meta") as devices:
        model.to("cuda:1")
        with devices.phase("forward"):
            model(...)
    devices.copies  # each tensor that went from one device to another
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torch.multiprocessing.reductions import StorageWeakRef

    _GROUP, _BACKWARD = "_group_tensors_by_device_and_dtype", "_engine_run_backward"
    getattr(torch._C, _GROUP), getattr(torch.autograd, _BACKWARD)
    MISSING = ""
except (ImportError, AttributeError) as error:  # internals of torch, which may go
    MISSING = f"this torch lacks what stands in for devices: {error}"

KIND, MEMORY = "cuda", 2**36
# Made by torch itself without an operand, such as the zeros of a gradient that is not there. On real devices it would
# be where it is needed: it takes the first device it meets.
_ANY = torch.device("meta", 0)
_REAL_TO: Any = Tensor.to
_REAL_DEVICE: Any = Tensor.device


class Copy(NamedTuple):
    """One tensor that went from one accelerator to another."""

    phase: str
    source: torch.device
    target: torch.device
    bytes: int


class _Shapes:
    """Results of operations on the meta device, by shapes: kernels there are slow Python code, and blocks are alike."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        key = (func, self._key(args), self._key(tuple(kwargs.items())))
        if key not in self._known:
            result = func(*args, **kwargs)
            self._known[key] = self._recipe(func, result)
            return result
        recipe = self._known[key]
        if recipe is None:
            return func(*args, **kwargs)
        made = [None if one is None else torch.empty_strided(*one[:2], dtype=one[2], device="meta") for one in recipe]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)

    def _key(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.stride(), value.dtype, _REAL_DEVICE.__get__(value)
        if isinstance(value, list | tuple):
            return tuple(map(self._key, value))
        return type(value), value

    def _recipe(self, func: Any, result: Any) -> list[Any] | None:
        """Shapes, strides and dtypes; None where results are not new tensors on the meta device."""
        results = result if isinstance(result, tuple) else (result,)
        if func._schema.is_mutable or any(one.alias_info for one in func._schema.returns):
            return None
        if not all(one is None or (isinstance(one, Tensor) and _on_meta(one)) for one in results):
            return None
        return [None if one is None else (one.shape, one.stride(), one.dtype) for one in results]


def _on_meta(tensor: Tensor) -> bool:
    return _REAL_DEVICE.__get__(tensor).type == "meta"


_SHAPES = _Shapes()


class _Lies:
    """Which storage is said to be on which accelerator; one for all instances, as networks keep tensors."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, torch.device | None]] = {}
        self._limit = 1 << 14

    def get(self, tensor: Tensor) -> torch.device | None:
        found = self._known.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def put(self, tensor: Tensor, device: torch.device | None) -> None:
        storage = tensor.untyped_storage()
        # While somebody refers to a storage, even weakly, no other gets its address.
        self._known[storage._cdata] = StorageWeakRef(storage), device
        if len(self._known) > self._limit:
            self._known = {key: found for key, found in self._known.items() if not found[0].expired()}
            self._limit = max(self._limit, 2 * len(self._known))


_LIES = _Lies()


class FakeDevices:
    """Devices ``cuda:0``, ``cuda:1``, …, while inside; see the module.

    known    how many ``torch.cuda`` tells of
    copies   all copies between accelerators so far
    current  index of the device that ``torch.cuda.set_device`` chose
    astray   names of operations on another device than that: kernels that ask for the current one would go wrong
    """

    def __init__(self, base: str = "cpu", known: int = 0) -> None:
        self.base, self.known = torch.device(base), known
        self.computing = False  # in torch's own kernels, some of which are Python code and look at devices
        self.copies: list[Copy] = []
        self.current, self.astray = 0, list[tuple[str, str]]()
        self._phase, self._stack = "", ExitStack()
        self._late: list[tuple[Tensor, Tensor]] = []  # on their way to the host: where to, what

    def __enter__(self) -> FakeDevices:
        functions, run = _Functions(self), getattr(torch.autograd, _BACKWARD)

        def backward(*args: Any, **kwargs: Any) -> Any:
            with functions:  # off while ``Tensor.backward`` itself is seen to, but blocks run again in there
                return run(*args, **kwargs)

        for owner, name, replaced in (
            (Tensor, "device", property(self._seen)),
            *((Tensor, f"is_{kind}", property(self._is(kind))) for kind in (KIND, "cpu", "meta")),
            (Tensor, "to", lambda tensor, *args, **kwargs: self._to(tensor, *args, **kwargs)),
            (Tensor, "cpu", lambda tensor: self._to(tensor, "cpu")),
            (Tensor, "pin_memory", lambda tensor: tensor),
            (torch.cuda, "set_device", self._choose),
            (torch.cuda, "current_device", lambda: self.current),
            (torch.cuda, "device_count", lambda: self.known),
            (torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY)),
            (torch.cuda, "synchronize", lambda device=None: self.wait()),
            (torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=self.wait)),
            (torch._C, _GROUP, self._grouped),
            (torch.autograd, _BACKWARD, backward),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, replaced))
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(functions)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside, for ``count``."""
        self._phase, before = name, self._phase
        try:
            yield
        finally:
            self._phase = before

    def count(self, phase: str) -> tuple[int, int]:
        """(copies between accelerators, their bytes) in a phase."""
        found = [copy.bytes for copy in self.copies if copy.phase == phase]
        return len(found), sum(found)

    def of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is said to be."""
        return _LIES.get(tensor) or _REAL_DEVICE.__get__(tensor)

    def _seen(self, tensor: Tensor) -> torch.device:
        return _REAL_DEVICE.__get__(tensor) if self.computing else self.of(tensor)

    def _is(self, kind: str) -> Callable[[Tensor], bool]:
        return lambda tensor: self._seen(tensor).type == kind

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy on ``device``, without a gradient."""
        known = len(self.astray)
        result = _REAL_TO(tensor.detach(), self.base, copy=True)
        del self.astray[known:]  # a copy chooses the device by itself
        _LIES.put(result, device if device.type == KIND else None)
        self.arrived(_LIES.get(tensor), _LIES.get(result), result)
        return result

    def arrived(self, source: torch.device | None, target: torch.device | None, tensor: Tensor) -> None:
        """A copy was made; all copies come by here."""
        if source is None or target is None or _ANY in (source, target):
            return
        if source != target:
            self.copies.append(Copy(self._phase, source, target, tensor.nbytes))

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, rest = kwargs.pop("device", None), []
        for value in args:
            if isinstance(value, Tensor):
                device, rest = self.of(value), [value.dtype]
            elif isinstance(value, str | torch.device) or type(value) is int:
                device = value
            elif isinstance(value, torch.dtype):
                rest.append(value)
        waits = not kwargs.pop("non_blocking", False)
        cast = _REAL_TO(tensor, *rest, **kwargs) if rest or kwargs else tensor
        target = self.of(tensor) if device is None else self.named(device)
        if target == self.of(cast):
            return cast
        copied = _Copied.apply(cast, self, target)
        if target.type == "cpu" and self.of(cast).type == KIND:
            self.sent(copied, waits)
        return copied

    def sent(self, arrived: Tensor, waits: bool) -> None:
        """Something went to the host: where nobody waits, ``arrived`` is another number until somebody does."""
        if waits:
            self.wait()
            return
        arrived = arrived.detach()
        self._late.append((arrived, arrived.clone()))
        arrived.copy_(arrived.logical_not())

    def wait(self) -> None:
        """All that was sent is there."""
        late, self._late = self._late, []
        for arrived, value in late:
            arrived.copy_(value)

    def _choose(self, device: Any) -> None:
        self.current = device if isinstance(device, int) else torch.device(device).index

    def named(self, device: Any) -> torch.device:
        """A device with its index, as tensors carry it."""
        device = torch.device(KIND, device) if isinstance(device, int) else torch.device(device)
        return torch.device(KIND, self.current) if device == torch.device(KIND) else device

    def _grouped(self, lists: Any, with_indices: bool = False) -> dict[Any, Any]:
        """By device and dtype of the first list, as optimizers and norms do before they take many tensors at once."""
        groups: dict[Any, tuple[list[list[Any]], list[int]]] = {}
        for index, first in enumerate(lists[0]):
            found, places = groups.setdefault((self.of(first), first.dtype), ([[] for _ in lists], []))
            for into, tensors in zip(found, lists, strict=True):
                if tensors:
                    into.append(tensors[index])
            places.append(index)
        return dict(reversed(groups.items()))  # torch keeps no order

    def meet(self, name: str, operands: Sequence[Tensor]) -> torch.device | None:
        """The device of an operation; RuntimeError for operands of two."""
        device, first = None, None
        for tensor in operands:
            here = _LIES.get(tensor)
            if here is None and device is not None and name in ("index", "index_put_"):
                continue  # torch sends the indices after what they select
            if here is not _ANY and (tensor.dim() or here is not None):  # numbers on the host go with all devices
                if first is not None and here != device:
                    told = [f"{list(one.shape)} on {self.of(one)}" for one in (first, tensor)]
                    raise RuntimeError(f"{name}: expected all tensors on one device, found {' and '.join(told)}")
                device, first = here, tensor
        if device is not None and device.index != self.current:
            self.astray.append((self._phase, name))
        return device

    def lie(self, device: torch.device | None, operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """What an operation made lies where it ran, and so does from now on an operand that could be anywhere."""
        for tensor in results:
            if (device is not None or not operands) and _LIES.get(tensor) in (None, _ANY):
                _LIES.put(tensor, device or _ANY)
        for tensor in operands:
            if device is not None and _LIES.get(tensor) is _ANY:
                _LIES.put(tensor, device)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, devices: FakeDevices, device: torch.device) -> Tensor:
        ctx.devices, ctx.source = devices, devices.of(tensor)
        return devices.moved(tensor, device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None, None]:
        return ctx.devices.moved(gradients[0], ctx.source), None, None


class _Functions(TorchFunctionMode):
    """New tensors on a device."""

    def __init__(self, devices: FakeDevices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        kwargs.pop("pin_memory", None)
        if device is not None and self._devices.named(device).type == KIND:
            result = func(*args, **(kwargs | {"device": self._devices.base}))
            _LIES.put(result, self._devices.named(device))
            return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and _LIES.get(result) is _ANY and not _tensors((*args, *kwargs.values())):
            _LIES.put(result, None)  # made by Python code where it says
        return result


class _Operators(TorchDispatchMode):
    """What is computed, in the forward and in the backward pass."""

    def __init__(self, devices: FakeDevices) -> None:
        super().__init__()
        self._devices = devices
        self._run = _SHAPES if devices.base.type == "meta" else lambda func, args, kwargs: func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "copy_":
            result, (target, source) = self._computed(func, args, kwargs), map(_LIES.get, args[:2])
            self._devices.arrived(source, target, args[0])
            if source is not None and target is None:
                self._devices.sent(args[0], not (args[2:] or [kwargs.get("non_blocking", False)])[0])
            return result
        rows = [(*args, *kwargs.values())]
        if name.startswith(("_foreach_", "_fused_")):  # many operations at once: each place of the lists is one
            lists = [value for value in args if isinstance(value, list | tuple) and value]
            rows = [tuple(values[index] for values in lists) for index in range(len(lists[0]))]
        operands = [_tensors(row) for row in rows]
        places = [self._devices.meet(name, row) for row in operands]
        result = self._computed(func, args, kwargs)
        made = result if len(rows) > 1 and isinstance(result, list | tuple) else [result] * len(rows)
        for place, row, one in zip(places, operands, made, strict=True):
            self._devices.lie(place, row, _tensors([one]))
        return result

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self._devices.computing, before = True, self._devices.computing
        try:
            with torch._C.DisableTorchFunction():
                return self._run(func, args, kwargs)
        finally:
            self._devices.computing = before
