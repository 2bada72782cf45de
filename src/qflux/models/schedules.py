"""Learning rate schedules: diffusers' formulas as a function of the step, so that a resume only sets the step.

The factors come from ``diffusers.optimization`` with every setting passed on; ``get_scheduler`` there drops some of
them (``num_cycles`` of cosine, the warm-up of constant).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qflux.errors import UserError
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Which settings each schedule has a use for.
_SETTINGS: dict[str, frozenset[str]] = {
    "constant": frozenset(),
    "constant_with_warmup": frozenset({"warmup_steps"}),
    "linear": frozenset({"warmup_steps"}),
    "cosine": frozenset({"warmup_steps", "num_cycles"}),
    "cosine_with_restarts": frozenset({"warmup_steps", "num_cycles"}),
    "polynomial": frozenset({"warmup_steps", "power"}),
}
_IDLE = {"warmup_steps": 0, "num_cycles": None, "power": 1.0}
_POLYNOMIAL_END = 1e-7  # the learning rate at which diffusers' polynomial schedule ends


def schedule_problems(cfg: Any, lr: float, total_steps: int) -> list[str]:
    """What is wrong with a schedule section for ``total_steps`` optimizer steps, one line each; loads no torch."""
    key, name = "train.lr_scheduler", cfg.name
    if name not in _SETTINGS:
        return [f"{key}.name: {name!r} is unknown; expected one of {', '.join(_SETTINGS)}"]
    problems = []
    for setting, idle in _IDLE.items():
        value = getattr(cfg, setting)
        if setting not in _SETTINGS[name] and value != idle:
            takers = ", ".join(other for other, settings in _SETTINGS.items() if setting in settings)
            problems.append(f"{key}.{setting}: {value} has no effect with {name}; remove it or use one of {takers}")
    if name == "polynomial" and lr <= _POLYNOMIAL_END:
        problems.append(f"train.optimizer.lr: {lr:g}; polynomial ends at {_POLYNOMIAL_END:g} and must start above it")
    if name == "polynomial" and cfg.warmup_steps >= total_steps:
        problems.append(f"{key}.warmup_steps: {cfg.warmup_steps} leaves none of {total_steps} steps for the polynomial")
    return problems


class Schedule:
    """Sets ``lr_base * factor(step)`` on every group; ``step`` counts optimizer steps done."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self._optimizer = optimizer
        self._factor = factor
        self._bases = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0
        self._apply()

    def _apply(self) -> None:
        factor = self._factor(self.last_epoch)
        for group, base in zip(self._optimizer.param_groups, self._bases, strict=True):
            group["lr"] = base * factor

    def tick(self) -> None:
        """One optimizer step was done."""
        self.last_epoch += 1
        self._apply()

    def lr(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def state(self) -> dict[str, int]:
        """All a resume needs: the step."""
        return {"step": self.last_epoch}

    def load(self, state: Mapping[str, int]) -> None:
        """Go to the step of a ``state()``; call it after the optimizer's state was loaded."""
        self.last_epoch = int(state["step"])
        self._apply()


def make_schedule(cfg: Any, optimizer: Optimizer, total_steps: int) -> Schedule:
    """The schedule of ``train.lr_scheduler`` over ``total_steps`` optimizer steps; ``optimizer`` still has its base lr.

    ``num_cycles: null`` is the schedule's own default. Raises UserError for settings without effect.
    """
    problems = schedule_problems(cfg, float(optimizer.param_groups[0]["lr"]), total_steps)
    if problems:
        raise UserError(*problems)
    return Schedule(optimizer, _factor(cfg, float(optimizer.param_groups[0]["lr"]), total_steps))


def _factor(cfg: Any, lr: float, total_steps: int) -> Callable[[int], float]:
    with quiet_imports():
        import torch
        from diffusers import optimization

    options: dict[str, Any] = {}
    if "warmup_steps" in _SETTINGS[cfg.name]:
        options["num_warmup_steps"] = cfg.warmup_steps
    if cfg.name not in ("constant", "constant_with_warmup"):
        options["num_training_steps"] = total_steps
    if "num_cycles" in _SETTINGS[cfg.name] and cfg.num_cycles is not None:
        options["num_cycles"] = cfg.num_cycles
    if "power" in _SETTINGS[cfg.name]:
        options["power"] = cfg.power
    make: Any = optimization.TYPE_TO_SCHEDULER_FUNCTION[optimization.SchedulerType(cfg.name)]
    # A scheduler object patches its optimizer's step; only its formula is wanted, so a stand-in is patched.
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    return make(stand_in, **options).lr_lambdas[0]
