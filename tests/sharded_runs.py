"""Training without data and files on the tiny networks, and what two processes find out about weights in shards.

``measure`` runs in each of two processes; tests/unit/test_sharded.py judges what it returns.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import NETWORKS, Lora, draw, family, feed_forward, lists, loss_of, network, quantize_in_place
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qflux.config import Config
from qflux.errors import UserError
from qflux.models.activations import set_checkpointing
from qflux.models.adapters import add_adapter, prepare_full, rounded_copy
from qflux.models.ema import Ema
from qflux.models.optimizers import eval_mode, make_optimizer
from qflux.parallel.group import Group
from qflux.parallel.placement import Placement, Seat
from qflux.parallel.sharded import ShardedPlacement
from qflux.types import Family

STEPS, SAMPLES = 3, 4  # of a run; of an optimizer step
NAMES = ("flux", "qwen_image")
QUANTO = ("quanto-fp8", "quanto-int8", "quanto-int4", "quanto-int2")
MIB = 2**20
WIDTH, DEPTH, FILE = 2048, 32, "blocks.safetensors"  # 256 MiB in 16 bits
ODD = Family("odd", "", (), block_lists=("blocks",))


def config(full: bool = False, optimizer: str = "adamw", quantize: Any = False, **train: Any) -> Config:
    model = {"pretrained_model_name_or_path": "owner/name", "quantize": quantize, **({"lora": None} if full else {})}
    settings = {"trainer": "Any", "mixed_precision": "no", "optimizer": {"name": optimizer, "lr": 1e-4}, **train}
    return Config(model=model, data={"dataset_path": "x"}, train=settings)


def place_at(kind: type[Placement], rank: int, processes: int, family: Family, config: Config) -> Any:
    return kind(config, family, Seat(torch.device("cpu"), rank, processes), Group())


class Run:
    """A network in training, without data and files: step k takes the samples [kG, (k+1)G)."""

    def __init__(
        self, kind: type[Placement], rank: int, processes: int, name: str, full: bool, optimizer: str = "adamw"
    ) -> None:
        made = config(full, optimizer)
        self.name, self.place = name, place_at(kind, rank, processes, family(name), made)
        model = network(name, full)
        set_checkpointing(model, "full", lists(name))
        self.model, self.params, self.optimizer = self.place.prepare(
            model, lambda params: make_optimizer(optimizer, params, made.train.optimizer)
        )
        self.ema, self.done = Ema(self.params, 0.9), 0

    def call(self, sample: int) -> dict[str, Any]:
        call = NETWORKS[self.name][1]()
        noise = torch.randn(call["hidden_states"].shape, generator=torch.Generator().manual_seed(sample))
        return {**call, "hidden_states": noise}

    def step(self, broken: int | None = None) -> tuple[float, bool]:
        """One optimizer step; process ``broken`` has a loss that is not finite."""
        place = self.place
        mine = range(SAMPLES)[place.rank :: place.processes]
        for i, sample in enumerate(mine):
            with place.sync_only_at(i == len(mine) - 1):
                loss = loss_of(self.model, self.call(self.done * SAMPLES + sample))
                place.backward(loss * (torch.nan if broken == place.rank else place.processes / SAMPLES))
        parameters = list(self.params.values())
        norm = place.clip(parameters, 0.05)
        place.step(self.optimizer, parameters, torch.isfinite(norm))
        self.ema.update()
        self.done += 1
        if self.done == 1:  # drawing with other weights leaves nothing behind
            with torch.no_grad(), self.ema.swapped():
                loss_of(self.place.unwrap(self.model), self.call(0))
        return norm.item(), bool(torch.isfinite(norm))

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.step()
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        place = self.place
        with eval_mode(self.optimizer):
            users = {name: value.clone() for name, value in place.whole(self.params).items()}
        return {
            "params": {name: value.detach().clone() for name, value in place.whole(self.params).items()},
            "users": users,
            "average": {name: value.clone() for name, value in place.whole(self.ema.average).items()},
            "optimizer": copy.deepcopy(place.optimizer_state(self.optimizer)),
        }

    def load(self, state: dict[str, Any], done: int) -> Run:
        self.place.fill(self.params, state["params"])
        self.place.fill(self.ema.average, state["average"])
        self.place.load_optimizer_state(self.optimizer, copy.deepcopy(state["optimizer"]))
        self.done = self.ema.updates = done
        return self


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes of those that reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.name().removeprefix("c10d::")] += 1
            if "allreduce" in func.name():
                self.reduced += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def traffic(rank: int, full: bool) -> dict[str, Any]:
    """Collectives of the second step (two micro-batches) of a network of four blocks."""
    run = Run(ShardedPlacement, rank, 2, "flux", full).steps(1)
    with Traffic() as seen:
        run.step()
    return {"counts": dict(seen.counts), "reduced": seen.reduced, "trained": sum(p.nbytes for p in run.params.values())}


def equality(rank: int) -> dict[str, Any]:
    """State after some steps, by FSDP2 and by DDP; then the state before the last, loaded again and continued."""
    found: dict[str, Any] = {}
    for name in NAMES:
        for full in (False, True):
            key = f"{name} {full}"
            run = Run(ShardedPlacement, rank, 2, name, full).steps(STEPS - 1)
            half = run.state()
            found[f"{key} half"], found[f"{key} fsdp"] = half, run.steps(1).state()
            found[f"{key} ddp"] = Run(Placement, rank, 2, name, full).steps(STEPS).state()
            # Only the main process has the whole state; it goes through the disk to the others.
            half = told(half)
            again = Run(ShardedPlacement, rank, 2, name, full).load(half, STEPS - 1)
            found[f"{key} again"], found[f"{key} resumed"] = again.state(), again.steps(1).state()
    run = Run(ShardedPlacement, rank, 2, "flux", True, "adamw_schedule_free")
    found["schedule_free"] = run.steps(STEPS).state()
    return found


def told(value: Any) -> Any:
    """Process 0's value, on all."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def broken(rank: int) -> dict[str, Any]:
    """Norms, and whether weights changed, around a step that is not finite on process 1."""
    found = {}
    for full in (False, True):
        run = Run(ShardedPlacement, rank, 2, "flux", full)
        norms, flags, same = [], [], []
        for bad in (None, 1, None):
            before = [param.detach().clone() for param in run.params.values()]
            norm, finite = run.step(bad)
            norms.append(norm)
            flags.append(finite)
            same.append(all(map(torch.equal, before, run.params.values())))
        found[f"{full}"] = {"norms": norms, "flags": flags, "same": same}
    return found


def adapted(name: str, method: str | None, dtype: torch.dtype) -> nn.Module:
    """A base in a lower dtype, perhaps quantized, with fp32 adapters that do something."""
    from qflux.demo.tiny_models import seeded

    with seeded(0):
        model = NETWORKS[name][0]().to(dtype)
    if method:
        quantize_in_place(model, method, lists(name))
    add_adapter(model, Lora, family(name), 0)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "lora_B" in part:
                weight.copy_(draw(*weight.shape) * 0.1)
    return model


def gradients(model: nn.Module, call: dict[str, Any]) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss = loss_of(model, call)
    loss.backward()
    found = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    return {**found, "loss": loss.detach()}


def same_gradients(rank: int) -> dict[str, bool]:
    """Case → whether every adapter's gradient in shards is the plain one's, to the bit, and so is a picture."""
    cases: list[tuple[str, str, str | None, torch.dtype]] = [
        *((name, "full", None, torch.float32) for name in NETWORKS),
        *(("flux", mode, None, torch.bfloat16) for mode in ("none", "ffn", "alternate", "selective")),
        *(("flux", mode, method, torch.bfloat16) for method in QUANTO for mode in ("none", "full")),
    ]
    found = {}
    for name, mode, method, dtype in cases:
        plain = adapted(name, method, dtype)
        call = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
                for k, v in NETWORKS[name][1]().items()}  # fmt: skip
        expected = gradients(plain, call)
        with torch.no_grad(), rounded_copy(plain, torch.bfloat16):
            picture = loss_of(plain, call)
        set_checkpointing(plain, mode, lists(name), feed_forward=feed_forward(name))
        place = place_at(ShardedPlacement, rank, 2, family(name), config())
        model, _, _ = place.prepare(plain, lambda params: torch.optim.SGD(params))
        ours = gradients(place.unwrap(model), call)
        same = all((a is None) == (ours[n] is None) and (a is None or torch.equal(a, ours[n]))
                   for n, a in expected.items())  # fmt: skip
        with torch.no_grad(), rounded_copy(model, torch.bfloat16):
            same &= torch.equal(loss_of(model, call), picture)
        same &= torch.equal(gradients(model, call)["loss"], expected["loss"])
        found[f"{name} {mode} {method}"] = same
    return found


class Odd(nn.Module):
    """Weights that two processes cannot share evenly, one of a single row, a buffer, a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5)) for _ in range(2))
        self.one = nn.Parameter(torch.randn(1))
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.one + self.shift
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)


def odd_step(place: Any) -> dict[str, Any]:
    """Whole weights of an uneven network in 16 bits before and after a step, and the optimizer's state."""
    torch.manual_seed(0)
    plain = Odd().to(torch.bfloat16)
    if not place.sharded:
        prepare_full(plain)
    model, params, optimizer = place.prepare(plain, lambda params: torch.optim.AdamW(params, lr=0.1))
    found = {"before": copy.deepcopy(place.whole(params)), "rows": [len(param) for param in params.values()]}
    place.backward(model(torch.ones(2, 5)).square().sum())
    parameters = list(params.values())
    place.step(optimizer, parameters, torch.isfinite(place.clip(parameters, 0)))
    found |= {"after": place.whole(params), "optimizer": place.optimizer_state(optimizer), "refused": ""}
    if place.sharded:
        with pytest.raises(UserError) as refused:
            place.fill(params, {"one": torch.ones(2)})
        found["refused"] = str(refused.value)
    return found


class Wide(nn.Module):
    """Blocks of 8 MiB each, in 16 bits; without memory of their own until weights are put in."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def mapped(rank: int, folder: str) -> dict[str, float]:
    """MiB of own memory that a network in shards takes whose weights lay in a mapped file, while placed and called."""
    from safetensors import safe_open

    model = Wide()
    with safe_open(Path(folder) / FILE, framework="pt") as file:
        for name, _ in list(model.named_parameters()):
            module, _, last = name.rpartition(".")
            weight = nn.Parameter(file.get_tensor(name), requires_grad=False)
            model.get_submodule(module)._parameters[last] = weight
    del weight
    place = place_at(ShardedPlacement, rank, 2, Family("wide", "", (), block_lists=("blocks",)), config())
    before, seen, done = own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    place.placed(model)
    after = own_memory()
    with torch.no_grad():
        model(torch.ones(1, WIDTH, dtype=torch.bfloat16))
    done.set()
    watcher.join()
    return {"after": after - before, "most": max(seen) - before}


def own_memory() -> float:
    """This process's memory that no file backs, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measure(rank: int, folder: str) -> dict[str, Any]:
    uneven = odd_step(place_at(ShardedPlacement, rank, 2, ODD, config(full=True)))
    return {
        "odd": uneven,
        "mapped": mapped(rank, folder),
        "equality": equality(rank),
        "traffic": {"lora": traffic(rank, False), "full": traffic(rank, True)},
        "broken": broken(rank),
        "gradients": same_gradients(rank),
        "whole": sorted(uneven["after"]),
    }
