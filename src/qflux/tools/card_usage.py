"""The parts of a model card that tell how to use it: code for diffusers, ComfyUI, sizes of control pictures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from string import Template

from qflux.config import Config
from qflux.data.geometry import sized_otherwise
from qflux.io.quiet import quiet_imports
from qflux.models.loading import torch_dtype
from qflux.models.memory_rules import base_precision
from qflux.tools.card_facts import HUB, Base, Call, CardFacts
from qflux.types import Family

_PATCHED = "# the controls keep their sizes"


def diffusers_part(facts: CardFacts, config: Config, family: Family) -> str:
    """Code that draws as the samples were drawn: the official pipeline, the weights, the call."""
    patch = _patch(facts, config, family)
    lines = ["## Use in diffusers", "", "```python"]
    lines += [*_imports(facts, config, family), "", *_loading(facts, config, family), ""]
    lines += [_PATCHED, *patch.splitlines(), ""] if patch else []
    lines += [*_opened(facts, config), *_drawing(facts, config, family), "```", ""]
    drawn = "the samples were drawn with" if facts.pictures else "the training's own validation uses"
    lines.append(f"The arguments are those that {drawn}. Made for diffusers 0.40 and newer.")
    if facts.call.framed and config.data.control_plan == "pipeline":
        lines.append("The control is cut to the frame of the picture that is drawn, as in training.")
    if facts.base.hub_id is None:
        lines.append(f"Put the base model's hub id, or its folder, in place of `path/to/{facts.base.name}`.")
    if facts.call.extended and not patch:
        lines.append(
            f"qflux itself draws with an extended {code(family.pipeline_class)} "
            f"({', '.join(map(code, facts.call.extended))}); the code above gives the official class what it takes, "
            "`python -m qflux.main --config RUN.yaml --sample` draws with all."
        )
    return "\n".join(lines)


def _imports(facts: CardFacts, config: Config, family: Family) -> list[str]:
    names = sorted({family.pipeline_class, *([facts.network] if facts.network else [])})
    lines = ["import torch", f"from diffusers import {', '.join(names)}"]
    if facts.call.pictures:
        lines.append("from diffusers.utils import load_image")
    if facts.call.pictures and (facts.call.framed or config.data.control_plan == "config"):
        lines.append("from PIL import Image, ImageOps")
    return lines


def _loading(facts: CardFacts, config: Config, family: Family) -> list[str]:
    dtype = f"dtype={torch_dtype(base_precision(config))}"
    base = _quoted(facts.base.hub_id or f"path/to/{facts.base.name}")
    options = [base, *([f"revision={_quoted(facts.base.revision)}"] if facts.base.revision else []), dtype]
    repo, weights = _quoted(facts.repo), _quoted(facts.weights)
    before, after = [], []
    if facts.network:
        load = f"{facts.network}.from_pretrained({repo}, subfolder={weights}, {dtype})"
        before = [f"{family.denoiser} = {load}"]
        options.append(f"{family.denoiser}={family.denoiser}")
    else:
        after = [f"pipe.load_lora_weights({repo}, weight_name={weights})"]
    load = f"pipe = {family.pipeline_class}.from_pretrained({', '.join(options)})"
    return [*before, load, 'pipe.to("cuda")', *after]


def _opened(facts: CardFacts, config: Config) -> list[str]:
    """Lines that open the control pictures, sized as in training where the config decided the sizes."""
    lines = []
    for name, (height, width) in zip(_control_names(facts.call), facts.call.controls, strict=False):
        opened = f'load_image("{name}.png")'
        if facts.call.framed or config.data.control_plan == "config":
            opened = f"ImageOps.fit({opened}, ({width}, {height}), Image.Resampling.LANCZOS)  # width, height"
        lines.append(f"{name} = {opened}")
    return lines


def _control_names(call: Call) -> list[str]:
    count = len(call.controls) if call.listed else min(1, len(call.controls))
    if not call.pictures:
        return []
    return ["control"] if count == 1 else [f"control_{i + 1}" for i in range(count)]


def _drawing(facts: CardFacts, config: Config, family: Family) -> list[str]:
    settings, call = config.logging.validation, facts.call
    arguments: dict[str, str] = {}
    if call.pictures:
        names = ", ".join(_control_names(call))
        arguments[call.pictures] = f"[{names}]" if call.listed else names
    arguments["prompt"] = _quoted(call.prompt or config.data.trigger_word or "your prompt")
    if family.classifier_free and settings.guidance_scale > 1 and _takes(family.pipeline_class, "negative_prompt"):
        arguments["negative_prompt"] = _quoted(family.empty_prompt)
    arguments |= {
        name: _quoted(value) if isinstance(value, str) else repr(value) for name, value in call.arguments.items()
    }
    arguments[family.guidance] = repr(settings.guidance_scale)
    arguments["num_inference_steps"] = repr(settings.num_inference_steps)
    arguments["generator"] = f'torch.Generator("cpu").manual_seed({settings.seed + call.index})'
    lines = [f"    {name}={value}," for name, value in arguments.items()]
    return ["picture = pipe(", *lines, ").images[0]", 'picture.save("picture.png")']


def _quoted(text: str) -> str:
    """A Python literal in double quotes; the escapes of JSON are Python's."""
    return json.dumps(text, ensure_ascii=False)


def _takes(pipeline_class: str, argument: str) -> bool:
    """Whether the official pipeline's call has an argument of that name."""
    with quiet_imports():
        import diffusers

        found = getattr(diffusers, pipeline_class, None)
    return found is not None and argument in inspect.signature(found.__call__).parameters


def comfyui_part(facts: CardFacts, config: Config, family: Family) -> str:
    """Which file goes where in ComfyUI; empty for a whole network, which is in diffusers' form only."""
    if config.model.lora is None:
        return ""
    lines = ["## Use in ComfyUI", ""]
    if facts.comfyui is not None:
        lines.append(
            f"Put [{facts.comfyui}]({facts.comfyui}) into `ComfyUI/models/loras/` and choose it in the node "
            "`LoraLoaderModelOnly`, strength 1.0, between the model's loader and the sampler."
        )
    else:
        lines.append(
            f"`{facts.weights}` is in the form of diffusers. `python -m qflux.main --config RUN.yaml --export comfyui "
            f"--adapter {facts.weights}` makes the file that goes into `ComfyUI/models/loras/` and is chosen in the "
            "node `LoraLoaderModelOnly`."
        )
    if _sized_by_config(config, family):
        lines.append(
            "Scale control pictures before they are encoded, as said below. Nodes that encode prompt and picture "
            "together may scale the picture again for the VAE: leave their `vae` input open there and pass the scaled "
            "picture through `VAEEncode` and `ReferenceLatent`."
        )
    return "\n".join(lines)


def _sized_by_config(config: Config, family: Family) -> bool:
    return config.data.control_plan == "config" and edits(config, family)


def _patch(facts: CardFacts, config: Config, family: Family) -> str:
    """The family's lines that keep its pipeline from resizing controls sized by the config; empty if it leaves them.

    In them ``$height`` and ``$width`` stand for the first control's, ``$in_order`` for a list of
    (width, height): the last control's, then each control's.
    """
    lines = family.control_patch
    controls = facts.call.controls
    if not lines or not controls or not _sized_by_config(config, family) or _kept(facts, family):
        return ""
    height, width = controls[0]
    in_order = [(wide, high) for high, wide in (controls[-1], *controls)]
    return Template(lines).substitute(height=height, width=width, in_order=in_order).strip()


def _kept(facts: CardFacts, family: Family) -> bool:
    """Whether the pipeline's own rule leaves controls of these sizes as they are."""
    return not sized_otherwise([((0, 0), *facts.call.controls)], family)


def control_sizes_part(facts: CardFacts, config: Config, family: Family) -> str:
    """``control_plan: config`` in plain words; nothing where the pipeline's own rule sized the controls."""
    if not _sized_by_config(config, family):
        return ""
    pipeline = code(family.pipeline_class)
    if _kept(facts, family):
        how = f"{pipeline} takes pictures of this size as they are."
    elif _patch(facts, config, family):
        how = f"{pipeline} would resize them once more; the lines under `{_PATCHED}` keep it from that."
    elif facts.call.extended:
        how = f"{pipeline} alone would resize them once more; the samples were drawn with an extension that does not."
    else:
        how = f"The arguments of the call keep {pipeline} from resizing them once more by its own rule."
    return "\n".join(
        [
            "## Sizes of control pictures (`control_plan: config`)",
            "",
            "In training the config decided the sizes of control pictures, not the pipeline's own rule. Size yours the "
            "same way, or the weights see something they were not trained on:",
            "",
            f"- {controls_rule(config)}",
            f"- in the samples: {', '.join(map(_size, facts.call.controls))} (height × width, pixels)",
            "",
            f"The code above does this: it cuts the middle out and scales it. {how}",
        ]
    )


def controls_rule(config: Config) -> str:
    """What decided the sizes of controls where the config did, (height × width)."""
    sizes = config.data.controls_size
    if sizes is None:
        return f"each control has the size of its target ({target_sizes(config)}); of another shape, at most its area"
    if len(sizes) == 1:
        return f"every control: {_size(sizes[0])}"
    return "; ".join(f"control {i}: {_size(size)}" for i, size in enumerate(sizes, start=1))


def target_sizes(config: Config) -> str:
    """What decided the sizes of targets, (height × width)."""
    data = config.data
    if data.target_size is not None:
        return _size(data.target_size)
    if data.multi_resolutions is None:
        return "as stored"
    shown = [_size(item) if isinstance(item, tuple) else str(item) for item in data.multi_resolutions]
    return "nearest of " + ", ".join(shown)


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} × {size[1]}"


def edits(config: Config, family: Family) -> bool:
    """Whether the result changes pictures: not where every validation sample does without one."""
    samples = config.logging.validation.samples
    return family.controls[1] > 0 and (not samples or any(sample.controls for sample in samples))


def base_link(base: Base) -> str:
    """The base model as Markdown: a link for a model of the hub."""
    return f"[{base.hub_id}]({HUB}/{base.hub_id})" if base.hub_id else f"{code(base.name)} (loaded from a folder)"


def code(text: str) -> str:
    """Inline code, whatever the text holds."""
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"
