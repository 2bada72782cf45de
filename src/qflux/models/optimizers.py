"""Optimizers by name, a masked step that never waits for the device, and their exact state.

``adamw`` (torch; fused on CUDA), ``adamw8bit`` (bitsandbytes), ``prodigy`` (prodigyopt), ``adafactor`` (transformers,
with an external learning rate: torch's own scales every update by the parameter's size, which stalls matrices that
start at zero) and ``adamw_schedule_free`` (schedulefree).
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qflux.errors import UserError
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

Params = list["torch.nn.Parameter"]

# Which settings beside lr and weight_decay an optimizer has a use for.
_SETTINGS: dict[str, frozenset[str]] = {
    "adamw": frozenset({"betas", "eps"}),
    "adamw8bit": frozenset({"betas", "eps"}),
    "prodigy": frozenset({"betas", "eps"}),
    "adafactor": frozenset(),
    "adamw_schedule_free": frozenset({"betas", "eps"}),
}
# How a loop over parameters is executed belongs to the process, not to the run: it is not taken from a saved state.
_EXECUTION = ("foreach", "fused", "capturable", "differentiable")
_PRODIGY_LEAST_LR = 1e-2


def optimizer_problems(cfg: Any) -> list[str]:
    """What is wrong with an optimizer section, one line each; loads neither torch nor an optimizer.

    A setting counts as wanted when it is written in the config and differs from its default.
    """
    name = cfg.name
    if name not in _SETTINGS:
        return [f"train.optimizer.name: {name!r} is unknown; expected one of {', '.join(_SETTINGS)}"]
    problems = [
        f"train.optimizer.{key}: {name} has no such setting; remove the line"
        for key in ("betas", "eps")
        if key not in _SETTINGS[name] and _wanted(cfg, key)
    ]
    if name == "prodigy" and cfg.lr < _PRODIGY_LEAST_LR:
        problems.append(
            f"train.optimizer.lr: {cfg.lr:g} with prodigy, which estimates the step itself and multiplies it by lr; "
            "set lr: 1.0"
        )
    return problems


def make_optimizer(name: str, params: Iterable[torch.nn.Parameter] | Mapping[str, torch.nn.Parameter], cfg: Any) -> Any:
    """Build the optimizer ``name`` over ``params`` (a list, or name → parameter) with the settings of ``cfg``.

    Raises UserError for a setting the optimizer has no use for and for a missing package.
    """
    problems = optimizer_problems(cfg)
    if problems:
        raise UserError(*problems)
    tensors = list(params.values()) if isinstance(params, Mapping) else list(params)
    moments = {"betas": tuple(cfg.betas), "eps": cfg.eps}
    settings: dict[str, Any] = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    settings |= {key: value for key, value in moments.items() if key in _SETTINGS[name]}
    return _BUILDERS[name](tensors, settings)


def _wanted(cfg: Any, key: str) -> bool:
    if key not in cfg.model_fields_set:
        return False
    return bool(getattr(cfg, key) != type(cfg).model_fields[key].get_default(call_default_factory=True))


def _package(module: str, name: str, hint: str) -> Any:
    try:
        with quiet_imports():
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"train.optimizer.name: {name} needs a package that is not installed ({error}); {hint}"
        ) from None


def _adamw(params: Params, settings: dict[str, Any]) -> Optimizer:
    import torch

    fused = bool(params) and all(param.device.type == "cuda" for param in params)
    return torch.optim.AdamW(params, **settings, fused=fused, foreach=not fused)


def _adamw8bit(params: Params, settings: dict[str, Any]) -> Optimizer:
    return _package("bitsandbytes", "adamw8bit", "pip install bitsandbytes").optim.AdamW8bit(params, **settings)


def _prodigy(params: Params, settings: dict[str, Any]) -> Optimizer:
    module = _package("prodigyopt", "prodigy", "pip install qflux[optimizers]")
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
        return module.Prodigy(params, **settings)


def _adafactor(params: Params, settings: dict[str, Any]) -> Optimizer:
    module = _package("transformers.optimization", "adafactor", "pip install transformers")
    return module.Adafactor(params, **settings, relative_step=False, scale_parameter=False, warmup_init=False)


def _schedule_free(params: Params, settings: dict[str, Any]) -> Optimizer:
    module = _package("schedulefree", "adamw_schedule_free", "pip install qflux[optimizers]")
    optimizer = module.AdamWScheduleFree(params, **settings)
    optimizer.train()
    return optimizer


_BUILDERS: dict[str, Callable[[Params, dict[str, Any]], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "adafactor": _adafactor,
    "adamw_schedule_free": _schedule_free,
}


def _parameters(optimizer: Optimizer) -> Params:
    return [param for group in optimizer.param_groups for param in group["params"]]


@contextlib.contextmanager
def eval_mode(optimizer: Optimizer) -> Iterator[None]:
    """While inside, the parameters hold the weights to validate and save: schedule-free's average, else unchanged.

    The training weights come back bit for bit (the optimizer's own way back interpolates and would drift).
    """
    import torch

    if not any(group.get("train_mode", False) for group in optimizer.param_groups):
        yield
        return
    params: list[Tensor] = list(_parameters(optimizer))
    saved = [param.detach().clone() for param in params]
    try:
        optimizer.eval()  # type: ignore[attr-defined]
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, saved)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def guarded_step(optimizer: Optimizer, params: Iterable[torch.nn.Parameter], finite: Tensor) -> None:
    """Step where ``finite`` (a boolean scalar) is true; where it is false, weights and state stay as they were.

    True gives the bits of a plain step. A flag on the CPU is simply read. On a device nothing waits for it: fused AdamW
    takes the flag into its kernel, the others step and are put back by a select; there, Python numbers in the state
    (Adafactor's step, schedule-free's averaging weight) count the skipped step. Read on the device too: the first step
    of all, which creates the state, steps of parameters that lie on the host (its kernels would not wait until the flag
    is there), and optimizers that wait in every step anyway (bitsandbytes, Prodigy).
    """
    live = [param for param in params if param.grad is not None]
    if finite.device.type == "cpu" or any(param.device.type == "cpu" for param in live):
        if bool(finite):
            optimizer.step()
    elif all(group.get("fused") for group in optimizer.param_groups):
        _step_fused(optimizer, finite)
    elif _waits(optimizer) or any(not optimizer.state.get(param) for param in live):
        if bool(finite):
            optimizer.step()
    else:
        _step_masked(optimizer, live, finite)


def _waits(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] in ("bitsandbytes", "prodigyopt")


def _step_fused(optimizer: Any, finite: Tensor) -> None:
    import torch

    optimizer.found_inf = torch.logical_not(finite).to(torch.float32).reshape(())
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def _step_masked(optimizer: Optimizer, params: Params, finite: Tensor) -> None:
    import torch

    live: list[Tensor] = list(params)
    for param in params:
        live += [
            value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor) and value.ndim > 0
        ]
    before = [tensor.detach().clone() for tensor in live]
    flags = {device: finite.to(device, non_blocking=True) for device in {tensor.device for tensor in live}}
    with torch.no_grad():
        optimizer.step()
        for tensor, old in zip(live, before, strict=True):
            tensor.copy_(torch.where(flags[tensor.device], tensor, old))


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The whole state as a tree of dicts, lists, numbers and tensors (references, not copies)."""
    return {"class": type(optimizer).__name__, **optimizer.state_dict()}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put a state of ``optimizer_state`` back, bit for bit. Raises UserError when it is of another optimizer."""
    found, expected = state["class"], type(optimizer).__name__
    if found != expected:
        raise UserError(
            f"train.optimizer.name: the checkpoint's optimizer state is of {found}, the config asks for {expected}"
        )
    groups = [dict(group) for group in state["param_groups"]]
    counts = [len(group["params"]) for group in groups], [len(group["params"]) for group in optimizer.param_groups]
    if counts[0] != counts[1]:
        raise UserError(
            f"the checkpoint's optimizer state holds {sum(counts[0])} parameters, the model trains {sum(counts[1])}; "
            "was the adapter's rank or target list changed?"
        )
    for saved, current in zip(groups, optimizer.param_groups, strict=True):
        saved |= {key: current[key] for key in _EXECUTION if key in current}
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
