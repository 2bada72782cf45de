"""FSDP2: weights in shards, one on each process's device; a block is whole only while it computes.

torch's ``fully_shard`` does the work, with one group of weights a block and one for the rest. Blocks move to the device
and are cut one after another, so no device holds the whole network, and no host either where the loader left the
weights in the mapped files.

adapters       The frozen base is sharded and travels in all-gathers only. Adapters stay whole on every process, in
               fp32, and their gradients are averaged once a step: parameters, optimizer and average are those of DDP.
full training  Everything is sharded, in fp32. What the optimizer and the average see are this process's own rows of
               each weight, as plain parameters that share memory with torch's shards; ``whole`` and ``fill`` translate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qflux.config import Config
from qflux.errors import UserError
from qflux.models.activations import named_blocks
from qflux.models.adapters import trainable
from qflux.parallel.group import Group
from qflux.parallel.placement import MakeOptimizer, Placement, Seat
from qflux.types import Family

ELSE = "or start without FSDP2 (accelerate_configs/ddp.yaml)"
# Optimizers that treat each number of a parameter on its own; the others would compute something else from a shard.
_BY_ELEMENT = ("adamw", "adamw_schedule_free")
_BUCKET = 2**26  # bytes of gradients that travel together


def sharding_problems(config: Config) -> list[str]:
    """What of a config cannot run in shards, one line each."""
    model, train = config.model, config.train
    problems = []
    if train.offload_blocks:
        problems.append(
            f"train.offload_blocks: found {train.offload_blocks}, but under FSDP2 blocks are spread over the devices "
            f"already; set 0, {ELSE}"
        )
    if str(model.quantize).startswith("bnb-"):
        problems.append(
            f"model.quantize: found {model.quantize}, whose statistics FSDP2 cannot spread; use a quanto format, {ELSE}"
        )
    if model.lora is None and train.optimizer.name not in _BY_ELEMENT:
        problems.append(
            f"train.optimizer.name: found {train.optimizer.name}, which needs whole parameters, but with model.lora: "
            f"null FSDP2 cuts them; use {' or '.join(_BY_ELEMENT)}, {ELSE}"
        )
    return problems


@dataclass
class _Shard:
    """A trained parameter's rows on this process: ``own`` shares memory with ``held``, the parameter in the model."""

    held: Any
    own: nn.Parameter

    @classmethod
    def of(cls, held: Any) -> _Shard:
        return cls(held, nn.Parameter(held.to_local().detach()))

    def gathered(self, rows: Tensor) -> Tensor:
        """The whole of what is like the parameter, from each process's rows; all processes call this."""
        held = self.held
        sizes = {"shape": held.shape, "stride": held.stride()}
        return DTensor.from_local(rows.detach(), held.device_mesh, held.placements, **sizes).full_tensor()

    def rows(self, whole: Tensor, name: str = "a parameter's state") -> Tensor:
        """This process's rows of a whole tensor, in memory of their own."""
        if whole.shape != self.held.shape:
            found, wanted = list(whole.shape), list(self.held.shape)
            raise UserError(f"the checkpoint is of another model: {name} is {found}, expected {wanted}")
        mesh = self.held.device_mesh
        parts = whole.chunk(mesh.size())
        rank = mesh.get_local_rank()
        return (parts[rank] if rank < len(parts) else whole[:0]).clone()


class ShardedPlacement(Placement):
    """Placement with the model's weights in shards; see the module.

    Every process runs the same forwards, also to draw. Between forwards every sharded weight is a shard again.
    """

    sharded = True

    def __init__(self, config: Config, family: Family, seat: Seat, group: Group) -> None:
        super().__init__(config, family, seat, group)
        problems = sharding_problems(config)
        if problems:
            raise UserError(*problems)
        self._full = config.model.lora is None
        self._mesh: DeviceMesh | None = None
        self._shards: dict[str, _Shard] = {}
        self._used: list[bool] | None = None

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer
    ) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]:
        """See Placement. ``model`` is changed in place; it may lie in mapped files; for full training in any dtype."""
        self._model = self.placed(model)
        params = trainable(model)
        if self._full:
            self._shards = {name: _Shard.of(param) for name, param in params.items()}
            params = {name: shard.own for name, shard in self._shards.items()}
        return self._model, params, make_optimizer(list(params.values()))

    def placed(self, model: nn.Module) -> Any:
        """See Placement; sharded, but for adapters."""
        odd = next((name for name, param in model.named_parameters() if type(param) is not nn.Parameter), None)
        if odd is not None:
            raise UserError(f"model.quantize: FSDP2 cannot spread {odd}; use plain weights or a quanto format, {ELSE}")
        # Blocks return parts of a tensor; nothing in the networks or here writes into what they return.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self._mesh = self._mesh or init_device_mesh(self.device.type, (self.processes,))
        whole = set() if self._full else {param for param in model.parameters() if param.requires_grad}
        for block in named_blocks(model, self.family.block_lists).values():
            self._shard(block, whole)
        self._shard(model, whole)
        return model

    def _shard(self, module: nn.Module, whole: set[nn.Parameter]) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                in_fp32 = self._full and tensor.is_floating_point()
                tensor.data = tensor.data.to(self.device, torch.float32 if in_fp32 else tensor.dtype)
        # The root too: what it kept whole after drawing would miss the next change of its shards.
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True, ignored_params=whole)

    @contextmanager
    def sync_only_at(self, last: bool) -> Iterator[None]:
        """See Placement; in full training gradients are cut in every micro-batch: whole ones would not fit."""
        yield

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """See Placement; gradients of adapters meet here."""
        parameters = list(parameters)
        if not self._full:
            self._average(parameters)
            return super().clip(parameters, max_norm)
        for shard in self._shards.values():
            shard.own.grad = None if shard.held.grad is None else shard.held.grad.to_local()
        squares = super().clip(parameters, 0).square()
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    @torch.no_grad()
    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Replace gradients by their mean over processes, many in one collective."""
        if self._used is None:
            # A text stream may end before the last block does: some adapters never have a gradient, on no process.
            has = torch.tensor([param.grad is not None for param in parameters], dtype=torch.uint8, device=self.device)
            torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
            self._used = [bool(flag) for flag in has.tolist()]
        gradients = []
        for param, used in zip(parameters, self._used, strict=True):
            if used:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                gradients.append(param.grad)
            elif param.grad is not None:
                raise RuntimeError("an adapter that had no gradient in the first step has one now")
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket]).div_(self.processes)
            torch.distributed.all_reduce(flat)
            pieces = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(own) for piece, own in zip(pieces, bucket, strict=True)])

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], finite: Tensor) -> None:
        """See Placement."""
        super().step(optimizer, parameters, finite)
        for shard in self._shards.values():
            shard.held.grad = None

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See Placement; in full training copies on the main process's CPU, and nothing on the others."""
        if not self._full:
            return super().whole(tensors)
        found = {}
        for name, rows in tensors.items():
            tensor = self._shards[name].gathered(rows)
            if self.main:
                found[name] = tensor.cpu()
        return found

    @torch.no_grad()
    def fill(self, params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """See Placement. Raises UserError for a value of another shape."""
        if self._full:
            values = {name: self._shards[name].rows(value, name) for name, value in values.items()}
        super().fill(params, values)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See Placement; in full training copies on the main process's CPU."""

        def collected(shard: _Shard, rows: Tensor) -> Tensor | None:
            tensor = shard.gathered(rows)
            return tensor.cpu() if self.main else None

        return self._each(optimizer, super().optimizer_state(optimizer), collected)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """See Placement."""
        super().load_optimizer_state(optimizer, self._each(optimizer, state, _Shard.rows))

    def _each(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], change: Callable[[_Shard, Tensor], Any]
    ) -> dict[str, Any]:
        """An optimizer's state with the tensors that are like a sharded parameter changed, in the same order always."""
        if not self._full:
            return dict(state)
        by_identity = {id(shard.own): shard for shard in self._shards.values()}
        shards = [by_identity[id(param)] for group in optimizer.param_groups for param in group["params"]]
        slots = {
            index: {
                key: change(shards[index], value) if isinstance(value, Tensor) and value.ndim else value
                for key, value in state["state"][index].items()
            }
            for index in sorted(state["state"])
        }
        return {**state, "state": slots}


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
