"""Where the keys of earlier layouts went: one table, used to explain an old file and to rewrite it.

Two layouts are known: sections at top level beside ``train`` (optimizer, loss, validation, predict, …), and the one
before it with devices in every section. A rule names the new key, or says why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qflux.config_errors import is_known
from qflux.config_yaml import Key, Tree, key_text

OLD_MODULES = {
    "qfluxutils.hugginface": "qflux.utils.huggingface",
    "qfluxutils.huggingface": "qflux.utils.huggingface",
    "qflux.utils.hugginface": "qflux.utils.huggingface",
}


@dataclass(frozen=True)
class Rule:
    """``new`` key of an old one and the name of the function that converts its value; or ``why`` it is gone."""

    new: str | None = None
    why: str = ""
    convert: str = "copy"

    @property
    def text(self) -> str:
        """What the message says of the key."""
        return f"is now {self.new}" if self.new else f"is gone: {self.why}"


def _gone(why: str, *keys: str) -> dict[str, Rule]:
    return {key: Rule(why=why) for key in keys}


_DEVICES = "what is loaded where is decided at run time, see --plan"
_GEOMETRY = "one geometry function cuts to the target's aspect, centred, and never scales up"
_RESUME = "give --resume PATH or --resume auto on the command line"
_INIT = "data.init_args."
_PROCESSOR = "data.init_args.processor."

RULES: dict[str, Rule] = {
    "trainer": Rule("train.trainer"),
    "resume": Rule(why=_RESUME),
    "predict": Rule(why="pictures are drawn with --sample; devices are decided at run time"),
    "model.rank": Rule("model.lora.r", convert="unless_set"),
    "data.class_path": Rule(why="the kind of a source is seen from its path"),
    f"{_INIT}dataset_path": Rule("data.dataset_path", convert="dataset"),
    f"{_INIT}caption_dropout_rate": Rule("data.caption_dropout_rate"),
    f"{_INIT}cache_drop_rate": Rule("data.caption_dropout_rate", convert="unless_set"),
    f"{_INIT}use_edit_mask": Rule(why="masks count where train.loss.mask_loss is true"),
    f"{_INIT}prompt_image_dropout_rate": Rule(why="it was never read"),
    f"{_INIT}selected_control_indexes": Rule(why="list the folders in control_path of a data.dataset_path entry"),
    f"{_INIT}image_size": Rule("data.target_size", convert="unless_set"),
    f"{_PROCESSOR}class_path": Rule(why=_GEOMETRY),
    f"{_PROCESSOR}init_args.target_size": Rule("data.target_size"),
    f"{_PROCESSOR}init_args.controls_size": Rule("data.controls_size"),
    f"{_PROCESSOR}init_args.multi_resolutions": Rule("data.multi_resolutions", convert="resolutions"),
    "data.shuffle": Rule(why="the order is always shuffled, from train.seed"),
    "loss.mask_loss": Rule("train.loss.mask_loss"),
    "loss.class_path": Rule("train.loss.mask_loss", convert="loss_class"),
    "optimizer.class_path": Rule("train.optimizer.name", convert="optimizer_class"),
    "lr_scheduler.scheduler_type": Rule("train.lr_scheduler.name"),
    "train.num_epochs": Rule(why="train.max_train_steps ends a run"),
    "train.low_memory": Rule(why="encoders are always loaded one at a time and freed"),
    "train.resume_from_checkpoint": Rule(why=_RESUME),
    "cache.prompt_empty_drop_keys": Rule(why="a dropped caption always becomes the whole encoded empty prompt"),
    "logging.logging_dir": Rule(why="logs lie in the run's folder under logging.output_dir"),
    **_gone("components come from the model's own folder or repository", "model.pretrained_embeddings"),
    **_gone("an adapter has no name of its own", "model.lora.adapter_name"),
    **_gone("trackers get the project name and the config", "logging.tags", "logging.notes"),
    **_gone(_DEVICES, "cache.devices", "train.vae_encoder_device", "train.text_encoder_device"),
    **_gone(_DEVICES, "train.text_encoder_2_device", "cache.vae_encoder_device", "cache.text_encoder_device"),
    **_gone(_DEVICES, "cache.text_encoder_2_device"),
    **_gone(_GEOMETRY, f"{_INIT}random_crop", f"{_INIT}crop_size", f"{_INIT}crop_scale", f"{_INIT}center_crop"),
    **_gone(_GEOMETRY, f"{_INIT}center_crop_ratio", *(f"{_PROCESSOR}init_args.{key}" for key in ("process_type",))),
    **_gone(_GEOMETRY, f"{_PROCESSOR}init_args.resize_mode", f"{_PROCESSOR}init_args.max_aspect_ratio"),
    **_gone(_GEOMETRY, f"{_PROCESSOR}init_args.resize_controls_mask_to_image"),
    **{f"lr_scheduler.{key}": Rule(f"train.lr_scheduler.{key}") for key in ("warmup_steps", "num_cycles", "power")},
    **{f"optimizer.init_args.{key}": Rule(f"train.optimizer.{key}") for key in ("lr", "betas", "eps", "weight_decay")},
    **{
        f"loss.{inside}{old}": Rule(f"train.loss.{new}")
        for inside in ("", "init_args.")
        for old, new in (
            ("forground_weight", "foreground_weight"),
            ("foreground_weight", "foreground_weight"),
            ("background_weight", "background_weight"),
        )
    },
    **{
        f"{section}.{key}": rule
        for section in ("validation", "logging.sampling")
        for key, rule in {
            "enabled": Rule("logging.validation.steps", convert="enabled"),
            "enable": Rule("logging.validation.steps", convert="enabled"),
            "steps": Rule("logging.validation.steps", convert="validation_steps"),
            "validation_steps": Rule("logging.validation.steps", convert="validation_steps"),
            "seed": Rule("logging.validation.seed"),
            "num_inference_steps": Rule("logging.validation.num_inference_steps"),
            "guidance_scale": Rule("logging.validation.guidance_scale"),
            "samples": Rule("logging.validation.samples", convert="samples"),
            "max_samples": Rule(why="list the pictures you want in logging.validation.samples"),
            "num_samples": Rule(why="list the pictures you want in logging.validation.samples"),
            "num_validation_samples": Rule(why="list the pictures you want in logging.validation.samples"),
        }.items()
    },
}
UNKNOWN = Rule(why="it is no key of this version")


def old_keys(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any, Rule | None]]:
    """Every outermost key of a file with its value and rule; None = a key of this version."""
    for name, below in value.items():
        here = (*key, name)
        rule = RULES.get(".".join(map(str, here)))
        if rule is not None:
            yield here, below, rule
        elif isinstance(below, Mapping) and below:
            yield from old_keys(below, here)
        elif not (isinstance(below, Mapping) and not is_known(here)):
            yield here, below, None if is_known(here) else UNKNOWN


def _old_modules(value: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    if isinstance(value, (Mapping, list)):
        for part, below in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _old_modules(below, (*key, part))
    elif isinstance(value, str):
        yield from ((key, old) for old in OLD_MODULES if old in value)


def old_layout_problems(tree: Tree, file: str) -> list[str]:
    """One message for a file of an old layout, a line for each key that moved or went; empty for any other file."""
    found = [(key, rule) for key, _, rule in old_keys(tree.value) if rule is not None]
    modules = list(_old_modules(tree.value))
    if not modules and all(rule is UNKNOWN for _, rule in found):
        return []
    lines = [f"{file}:{tree.lines[key]}: {key_text(key)} {rule.text}" for key, rule in found]
    lines += [f"{file}:{tree.lines[key]}: {key_text(key)}: {old} is now {OLD_MODULES[old]}" for key, old in modules]
    advice = f"write the new file with: python -m qflux.migrate {file}"
    return [f"{file}: this config has the layout of an earlier version", *lines, advice]
