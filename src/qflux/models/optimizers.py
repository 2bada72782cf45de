"""Optimizers by name, a masked step that never waits for the device, and their exact state.

``adamw`` (torch; fused on CUDA), ``adamw8bit`` (bitsandbytes), ``prodigy`` (prodigyopt), ``adafactor`` (transformers,
with an external learning rate: torch's own scales every update by the parameter's size, which stalls matrices that
start at zero) and ``adamw_schedule_free`` (schedulefree).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
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
# name → (its package, how to get it), where that is not one that qflux always has
_PACKAGES = {
    "adamw8bit": ("bitsandbytes", "pip install bitsandbytes"),
    "prodigy": ("prodigyopt", "pip install qflux[optimizers]"),
    "adamw_schedule_free": ("schedulefree", "pip install qflux[optimizers]"),
}
# What training itself changes in a group of parameters. All else is of the config, or of the process (how a loop over
# parameters is executed), and not taken from a saved state.
_MOVING = frozenset(
    {"lr", "k", "d", "d_max", "d_hat", "d_numerator", "d_denom", "weight_sum", "lr_max", "scheduled_lr"}
)
_LARGEST = 1e30  # of a count or a number in a saved state: powers of larger ones overflow
_PRODIGY_LEAST_LR = 1e-2
_SHOWN = 3


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
    package, hint = _PACKAGES.get(name, (None, ""))
    if package is not None and importlib.util.find_spec(package) is None:
        problems.append(f"train.optimizer.name: {name} needs {package}, which is not installed; {hint}")
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


def _package(name: str) -> Any:
    package, hint = _PACKAGES[name]
    try:
        with quiet_imports():
            return importlib.import_module(package)
    except ImportError as error:  # it is there, something that it needs is not
        raise UserError(
            f"train.optimizer.name: {name} needs {package}, which cannot be loaded ({error}); {hint}"
        ) from None


def _adamw(params: Params, settings: dict[str, Any]) -> Optimizer:
    import torch

    fused = bool(params) and all(param.device.type == "cuda" for param in params)
    return torch.optim.AdamW(params, **settings, fused=fused, foreach=not fused)


def _adamw8bit(params: Params, settings: dict[str, Any]) -> Optimizer:
    return _package("adamw8bit").optim.AdamW8bit(params, **settings)


def _prodigy(params: Params, settings: dict[str, Any]) -> Optimizer:
    module = _package("prodigy")
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
        return module.Prodigy(params, **settings)


def _adafactor(params: Params, settings: dict[str, Any]) -> Optimizer:
    with quiet_imports():
        from transformers.optimization import Adafactor
    return Adafactor(params, **settings, relative_step=False, scale_parameter=False, warmup_init=False)


def _schedule_free(params: Params, settings: dict[str, Any]) -> Optimizer:
    optimizer = _package("adamw_schedule_free").AdamWScheduleFree(params, **settings)
    optimizer.train()
    return optimizer


_BUILDERS: dict[str, Callable[[Params, dict[str, Any]], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "adafactor": _adafactor,
    "adamw_schedule_free": _schedule_free,
}
_CLASSES = {
    "AdamW": "adamw",
    "AdamW8bit": "adamw8bit",
    "Prodigy": "prodigy",
    "Adafactor": "adafactor",
    "AdamWScheduleFree": "adamw_schedule_free",
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
    """Put a state of ``optimizer_state`` back, bit for bit.

    Raises UserError when it is of another optimizer or of other parameters, or was altered so that a step would fail.
    """
    if not isinstance(state, Mapping) or not {"class", "state", "param_groups"} <= state.keys():
        raise UserError("found no state of an optimizer, expected its class, state and param_groups")
    found, expected = state["class"], type(optimizer).__name__
    if found != expected:
        raise UserError(
            f"the optimizer's state is of {str(found)[:40]!a}, expected {expected}, as train.optimizer.name says"
        )
    groups, slots = _groups(optimizer, state["param_groups"]), state["state"]
    problems = _slot_problems(optimizer, slots)
    if problems:
        more = len(problems) - _SHOWN
        raise UserError(*problems[:_SHOWN], *([f"and {more} more like these"] if more > 0 else []))
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _groups(optimizer: Optimizer, saved: Any) -> list[dict[str, Any]]:
    """The groups to go on with: saved numbers where training changes them, else what the optimizer has now."""
    lists = [group.get("params") for group in saved if isinstance(group, dict)] if isinstance(saved, list) else []
    numbers = [[index for index in ids if type(index) is int] for ids in lists if isinstance(ids, list)]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    wanted = [list(range(sum(sizes[:position]), sum(sizes[: position + 1]))) for position in range(len(sizes))]
    if numbers != wanted:
        raise UserError(
            f"the optimizer's state holds {sum(map(len, numbers))} parameters, the model trains {sum(sizes)}; "
            "was the adapter's rank or target list changed?"
        )
    trios = zip(saved, wanted, optimizer.param_groups, strict=True)
    return [_group(one, current) | {"params": ids} for one, ids, current in trios]


def _group(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: value for key, value in saved.items() if key in _MOVING}
    wanted = {key: current.get(key, 0.0) for key in (_MOVING & current.keys()) | numbers.keys()}
    for key, example in sorted(wanted.items()):
        found = _form(numbers.get(key))
        if found != _form(example):
            raise UserError(f"param_groups: {key} is {found}, expected {_form(example)}")
    merged = {**current, **numbers}
    order = dict.fromkeys([*(key for key in saved if key in merged), *merged])
    return {key: merged[key] for key in order}


def _slot_problems(optimizer: Optimizer, slots: Any) -> list[str]:
    """What of a saved state is not as this optimizer makes it for its parameters, a line each."""
    params = _parameters(optimizer)
    if not isinstance(slots, Mapping) or not all(type(index) is int and index in range(len(params)) for index in slots):
        return [f"state: found other entries than of the parameters 0 to {len(params) - 1}"]
    known: dict[Any, list[dict[str, str]]] = {}
    problems = []
    for index, slot in slots.items():
        param = params[index]
        kind = (param.shape, param.dtype, param.device)
        if kind not in known:
            known[kind] = _slot_forms(type(optimizer).__name__, param)
        found = _forms(slot)
        if found in known[kind]:
            continue
        wanted = known[kind][0]
        if found.keys() != wanted.keys():
            problems.append(f"parameter {index}: found {_listed(found)}, expected {_listed(wanted)}")
            continue
        key = next(key for key in wanted if all(found[key] != forms[key] for forms in known[kind]))
        problems.append(f"parameter {index}: {key} is {found[key]}, expected {wanted[key]}")
    return problems


def _slot_forms(name: str, param: Tensor) -> list[dict[str, str]]:
    """Forms of the state that an optimizer makes in its first step for a parameter like this one.

    Prodigy makes another one for a parameter of zeros, such as an adapter's second matrix.
    """
    import torch

    found = []
    for value in (1.0, 0.0):
        twin = torch.nn.Parameter(torch.full_like(param, value, requires_grad=False))
        twin.grad = torch.zeros_like(twin)
        optimizer = _BUILDERS[_CLASSES[name]]([twin], {"lr": 1.0, "weight_decay": 0.0})
        optimizer.step()
        found.append(_forms(optimizer.state_dict()["state"][0]))
    return found


def _forms(slot: Any) -> dict[str, str]:
    """The form of each value of a parameter's state, by name; some optimizers nest a part of them."""
    found: dict[str, str] = {}
    for key, value in slot.items() if isinstance(slot, Mapping) else ():
        own = str(key).replace(".", "_")
        if isinstance(value, Mapping):
            found |= {f"{own}.{name}": form for name, form in _forms(value).items()}
        else:
            found[own] = _form(value)
    return found


def _form(value: Any) -> str:
    """Shape and dtype of a tensor, or the type of a number; what no step could go on from is told as it is."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.ndim == 0 and not value.is_complex() and not 0 <= value.item() <= _LARGEST:
            return f"{value.item()}"
        return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if type(value) in (int, float) and abs(value) <= _LARGEST and (type(value) is float or value >= 0):
        return f"a number ({type(value).__name__})"
    return ascii(value)[:60]


def _listed(names: Iterable[str]) -> str:
    return ascii(sorted(map(str, names)))[:200]
