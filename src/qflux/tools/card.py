"""The model card (README.md) of a trained adapter or network: YAML front matter for the hub, and text for people.

A card tells what the run's folder tells, and nothing of the machine: no path, host or time, and no prompt but those of
the validation samples. Fields follow the hub's model card metadata as ``huggingface_hub.ModelCardData`` writes it.
"""

from __future__ import annotations

from qflux.config import Config, LossConfig
from qflux.io.quiet import quiet_imports
from qflux.models.loading import torch_dtype
from qflux.tools.card_facts import CardFacts
from qflux.tools.card_usage import (
    base_link,
    code,
    comfyui_part,
    control_sizes_part,
    controls_rule,
    diffusers_part,
    edits,
    target_sizes,
)
from qflux.types import Family


def write_card(facts: CardFacts, config: Config, family: Family) -> str:
    """The whole README.md."""
    with quiet_imports():
        from huggingface_hub import ModelCard

    parts = [
        _title(facts, config, family),
        _samples(facts, config),
        diffusers_part(facts, config, family),
        comfyui_part(facts, config, family),
        control_sizes_part(facts, config, family),
        _training(facts, config, family),
        _limits(facts, config),
        _licence(facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_front(facts, config, family)}\n---\n\n{body}\n"))


def _front(facts: CardFacts, config: Config, family: Family) -> str:
    """The YAML front matter."""
    with quiet_imports():
        from huggingface_hub import ModelCardData

    task = "image-to-image" if edits(config, family) else "text-to-image"
    kind = ["template:sd-lora", "lora"] if config.model.lora is not None else []
    if config.model.lora is not None and config.model.lora.use_dora:
        kind.append("dora")
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        base_model=facts.base.hub_id,
        base_model_relation=_relation(config) if facts.base.hub_id else None,
        license=facts.licence.id,
        license_name=facts.licence.name,
        license_link=facts.licence.link,
        tags=[task, "diffusers", "diffusers-training", *kind, "qflux"],
        instance_prompt=config.data.trigger_word,
        datasets=[entry.repo_id for entry in config.data.dataset_path if entry.repo_id] or None,
        widget=[{"text": prompt or "-", "output": {"url": path}} for path, prompt in facts.pictures] or None,
    )
    return data.to_yaml()


def _relation(config: Config) -> str:
    return "adapter" if config.model.lora is not None else "finetune"


def _title(facts: CardFacts, config: Config, family: Family) -> str:
    lora = config.model.lora
    what = "A whole network" if lora is None else f"A {'DoRA' if lora.use_dora else 'LoRA'} of rank {lora.r}"
    does = "edits pictures" if edits(config, family) else "draws pictures from text"
    lines = [
        f"# {facts.repo.partition('/')[2]}",
        "",
        f"{what} for {base_link(facts.base)} that {does}, trained for {facts.step} steps with qflux.",
    ]
    if config.data.trigger_word:
        lines += ["", f"Trigger word: {code(config.data.trigger_word)} (put it into the prompt)."]
    return "\n".join(lines)


def _samples(facts: CardFacts, config: Config) -> str:
    if not facts.pictures and facts.sheet is None:
        return ""
    settings = config.logging.validation
    lines = ["## Samples", "", "<Gallery />", ""]
    if facts.sheet is not None:
        lines += [
            f"![samples]({facts.sheet})",
            "",
            "Each row from left to right: the control picture, before (what the run drew before its first step), after "
            "(with these weights), the right answer. Grey: there is none.",
        ]
    else:
        lines += [f"![sample]({path})" for path, _ in facts.pictures]
    later = "" if facts.drawn_at == facts.step else f"; these weights are those of step {facts.step}"
    lines += ["", f"Drawn at step {facts.drawn_at}{later}; picture i from noise of seed {settings.seed} + i."]
    return "\n".join(lines)


def _training(facts: CardFacts, config: Config, family: Family) -> str:
    rows = [*_run_rows(facts, config, family), *_adapter_rows(config), *_method_rows(config, family)]
    rows.append(("seed", str(config.train.seed)))
    rows += [("digest of the data", code(facts.digest))] if facts.digest else []
    rows += [("qflux", facts.version)] if facts.version else []
    cells = [(name, value.replace("|", r"\|")) for name, value in rows]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _run_rows(facts: CardFacts, config: Config, family: Family) -> list[tuple[str, str]]:
    base = base_link(facts.base) + (f", revision {code(facts.base.revision)}" if facts.base.revision else "")
    rows = [
        ("base model", base),
        ("trainer", code(config.train.trainer)),
        ("optimizer steps", str(facts.step)),
        ("samples per step", str(facts.batch)),
        ("samples seen", str(facts.samples)),
        ("size of targets (height × width)", target_sizes(config)),
    ]
    if edits(config, family):
        by_config = config.data.control_plan == "config"
        rows.append(("size of controls", controls_rule(config) if by_config else "by the rule of the pipeline"))
    if facts.held_out is not None:
        rows.append((f"held-out loss at step {facts.held_out[0]}", f"{facts.held_out[1]:.4g}"))
    return rows


def _adapter_rows(config: Config) -> list[tuple[str, str]]:
    lora = config.model.lora
    if lora is None:
        return [("trained", "the whole network")]
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    rows = [
        ("adapter", "DoRA" if lora.use_dora else "LoRA"),
        ("rank, alpha", f"{lora.r}, {lora.lora_alpha}"),
        ("targets", ", ".join(map(code, targets))),
    ]
    return [*rows, *([("started from", "another adapter")] if lora.pretrained_weight else [])]


def _method_rows(config: Config, family: Family) -> list[tuple[str, str]]:
    train, dropout = config.train, config.data.caption_dropout_rate
    optimizer, schedule, sigma = train.optimizer, train.lr_scheduler, train.sigma
    level = {
        "logit_normal": f" (mean {sigma.logit_mean:g}, deviation {sigma.logit_std:g})",
        "mode": f" (scale {sigma.mode_scale:g})",
    }.get(sigma.sampling, "")
    rows = [
        ("optimizer", f"{optimizer.name}, learning rate {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"),
        ("schedule", f"{schedule.name}, {schedule.warmup_steps} warm-up steps"),
        ("loss", _loss(train.loss)),
        ("noise levels (sigma)", f"{sigma.sampling}{level}, shift {sigma.shift}, weighting {sigma.weighting}"),
        ("caption dropout", f"{dropout:g}"),
        ("precision", _precision(config)),
    ]
    if family.guidance == "guidance_scale" and not family.classifier_free:
        rows.append(("guidance in training", f"{train.guidance_scale:g}"))
    return rows if train.ema is None else [*rows, ("averaged weights (EMA)", f"decay {train.ema.decay:g}")]


def _loss(loss: LossConfig) -> str:
    if not loss.mask_loss:
        return loss.name
    weights = f"weight {loss.foreground_weight:g} inside the masks, {loss.background_weight:g} outside"
    return f"{loss.name}, {weights}{', normalised' if loss.normalize else ''}"


def _precision(config: Config) -> str:
    dtype = str(torch_dtype(config.train.mixed_precision)).removeprefix("torch.")
    if config.model.lora is None:
        return f"weights in float32, computed in {dtype}"
    base = f"base {dtype}, its blocks {config.model.quantize}" if config.model.quantize else f"base {dtype}"
    return f"{base}, adapter float32"


def _limits(facts: CardFacts, config: Config) -> str:
    lines = [
        "## Limits",
        "",
        "- It learned from one data set; pictures and prompts unlike it may come out wrong.",
        "- Sizes far from the trained ones were not tried.",
        "- What holds for the base model (bias, misuse, what it cannot draw) holds for this too.",
    ]
    if facts.held_out is None and not facts.pictures:
        lines.append("- It was not evaluated: there are neither samples nor a held-out loss.")
    if config.model.quantize:
        lines.append(
            f"- Trained and drawn on a base in {config.model.quantize}; on a plain base pictures differ a little."
        )
    if facts.averaged:
        lines.append("- The weights are the run's moving average, as in the samples.")
    return "\n".join(lines)


def _licence(facts: CardFacts) -> str:
    base, licence = base_link(facts.base), facts.licence
    if not licence.known:
        text = (
            f"The licence of {base} applies; it could not be read when this card was written. Look it up at its source."
        )
    else:
        name = licence.name or licence.id
        text = f"{f'[{name}]({licence.link})' if licence.link else code(name)}, inherited from {base}."
    return f"## Licence\n\n{text}"
