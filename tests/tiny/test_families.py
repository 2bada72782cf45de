"""Training is inference for every family: network arguments, velocities, encodings, and mutations that must show.

The judge is the official pipeline with its own components: the whole text encoder, the official processor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qflux.data.feeder import collate
from qflux.types import EditSample, EncodedSample, Noised, Resize, SizePlan
from qflux.validation import oracle
from qflux.validation.oracle import Difference

BOUND, TIGHT, RED, LEVELS = 1e-5, 1e-6, 1e-4, 5
ROWS = {
    "flux": [0],
    "flux_schnell": [0],
    "flux_kontext": [0, 1, 2, 3],
    "flux2": [0, 1, 2, 3],
    "flux2_klein": [0, 1, 2, 3],
    "qwen_image": [0],
    "qwen_image_edit": [1],
    "qwen_image_edit_plus": [1, 2, 3],
    "qwen_image_edit_plus_2511": [1, 2, 3],
}
CASES = [(name, count) for name, counts in ROWS.items() for count in counts]
QWEN = [name for name in ROWS if name.startswith("qwen")]
CAPTIONS = ("make the circle red", "", "make the background a lighter blue and keep the square")
SIZES = ((96, 64), (64, 96), (64, 80), (80, 64))  # target, controls; all of another shape


def smooth(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of soft random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def whole(size: tuple[int, int]) -> Resize:
    return Resize((0.0, 0.0, float(size[1]), float(size[0])), size)


def sample(trainer: Any, count: int, number: int = 0) -> EditSample:
    """Sample ``number`` with ``count`` controls; the text encoder sees them as the pipeline makes them."""
    target, *controls = [smooth(size, 10 * number + i) for i, size in enumerate(SIZES[: count + 1])]
    rule, seen = trainer.family.text_control_size, []
    for control in controls if rule else []:
        height, width = rule((control.height, control.width))
        seen.append(control.resize((width, height), Image.Resampling.LANCZOS))
    plan = SizePlan(whole(SIZES[0]), tuple(whole(size) for size in SIZES[1 : count + 1]))
    return EditSample(target, controls, CAPTIONS[number], None, f"s{number}", "", plan, seen)


@dataclass
class Case:
    """A family with a number of controls: three samples, and what the pipeline called its network with for each."""

    trainer: Any
    components: dict[str, Any]
    official: dict[str, Any]
    samples: list[EditSample]
    encoded: list[EncodedSample]
    pipe: Any
    calls: list[list[dict[str, Any]]]  # of each sample: one a noise level

    def difference(self, chosen: list[int], level: int) -> Difference:
        """Largest difference among the velocities of ``chosen`` samples, predicted as one batch."""
        encoded, calls = [self.encoded[i] for i in chosen], [self.calls[i][level] for i in chosen]
        found, expected = oracle.replay(self.trainer, self.components["transformer"], self.pipe, encoded, calls)
        return oracle.worst(Difference.of(*pair) for pair in zip(found, expected, strict=True))

    def error(self, chosen: list[int]) -> float:
        """The same over all noise levels."""
        return max(self.difference(chosen, level).relative for level in range(LEVELS))


@pytest.fixture(scope="module")
def case(tiny: Callable[[str], Any]) -> Callable[[str, int], Case]:
    """``case(name, controls)``, recorded at its first use."""
    made: dict[tuple[str, int], Case] = {}

    def get(name: str, count: int) -> Case:
        if (name, count) not in made:
            one = tiny(name)
            samples = [sample(one.trainer, count, number) for number in range(len(CAPTIONS))]
            encoded = oracle.encode_samples(one.trainer, one.components, samples)
            pipe = oracle.official_pipeline(one.trainer, one.official, samples[0])
            calls = [
                oracle.record_sample(one.trainer, pipe, entry, seed=number, steps=LEVELS)
                for number, entry in enumerate(samples)
            ]
            made[name, count] = Case(one.trainer, one.components, one.official, samples, encoded, pipe, calls)
        return made[name, count]

    return get


@pytest.mark.parametrize(("name", "count"), CASES)
def test_training_is_inference(case: Callable[[str, int], Case], name: str, count: int) -> None:
    here = case(name, count)
    assert [len(calls) for calls in here.calls] == [LEVELS] * 3
    assert len({call["sigma"] for call in here.calls[0]}) == LEVELS
    lengths = {one.text["prompt_embeds"].shape[0] for one in here.encoded}
    assert len(lengths) == (3 if name in QWEN else 1), "three captions of different length"
    assert here.error([0]) <= BOUND
    assert here.error([0, 1, 2]) <= BOUND


@pytest.mark.parametrize(("name", "count"), CASES)
def test_the_network_gets_the_very_same_arguments(
    case: Callable[[str, int], Case], monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """Text, latents, ids, guidance and timestep, bit by bit; the pipeline encodes with its own components."""
    here = case(name, count)
    monkeypatch.setattr(oracle, "encode_samples", lambda *_: here.encoded[:1])
    assert oracle.argument_difference(here.trainer, here.official, here.samples[0]).maximum == 0


def changed_rule(name: str, count: int) -> set[str]:
    """What the judge overrides of the official class: more controls than that takes, or controls of other sizes."""
    if name.startswith("qwen_image_edit"):
        return {"__call__", "control_sizes"}
    return {"prepare_latents", "more_controls"} if name == "flux_kontext" and count > 1 else set()


@pytest.mark.parametrize(("name", "count"), CASES)
def test_the_judge_is_the_official_class_or_changes_one_rule(
    case: Callable[[str, int], Case], name: str, count: int
) -> None:
    import diffusers

    here = case(name, count)
    official, kind = getattr(diffusers, here.trainer.family.pipeline_class), type(here.pipe)
    if not changed_rule(name, count):
        assert kind is official
        return
    assert kind.__mro__[1] is official
    marks = {"__module__", "__doc__", "__annotations__", "__qualname__", "__firstlineno__", "__static_attributes__"}
    assert {word for word in vars(kind).keys() - marks if not word.startswith("_abc")} == changed_rule(name, count)


@pytest.mark.parametrize("name", ROWS)
def test_every_count_of_the_row_is_here(tiny: Callable[[str], Any], name: str) -> None:
    least, most = tiny(name).trainer.family.controls
    assert ROWS[name] == list(range(least, min(most, 3) + 1))


Arguments = dict[str, Any]


def changed(
    monkeypatch: pytest.MonkeyPatch,
    trainer: Any,
    arguments: Callable[[Arguments], Any] | None = None,
    batch: Callable[[Any], Any] | None = None,
) -> None:
    """From now on the trainer calls the network with other arguments, or is given another batch."""
    original = type(trainer).predict

    def predict(self: Any, model: Any, noised: Noised, given: Any) -> Any:
        def call(**named: Any) -> Any:
            if arguments is not None:
                arguments(named)
            return model(**named)

        call.config = model.config  # type: ignore[attr-defined]
        return original(self, call, noised, given if batch is None else batch(given))

    monkeypatch.setattr(type(trainer), "predict", predict)


def put(key: str, change: Callable[[Any], Any]) -> Callable[[Arguments], None]:
    return lambda named: named.update({key: change(named[key])})


def time_ids(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arguments], None]:
    """Change the first axis of the image ids: which picture a position belongs to."""
    return put("img_ids", lambda ids: torch.cat([change(ids[..., :1]), ids[..., 1:]], dim=-1))


def shapes(change: Callable[[list[Any]], list[Any]]) -> Callable[[Arguments], None]:
    return put("img_shapes", lambda batch: [change(list(one)) for one in batch])


TIMESTEP = put("timestep", lambda t: t * 1000)
TURNED = put("img_ids", lambda ids: torch.cat([ids[..., :1], ids[..., 1:3].flip(-1), ids[..., 3:]], dim=-1))
OTHER_TEXT = put("encoder_hidden_states", lambda text: text.roll(1, 0))
GUIDANCE = put("guidance", lambda g: g + 1)
FLUX = {
    "timestep": TIMESTEP,
    "rows and columns": TURNED,
    "other text": OTHER_TEXT,
    "other pooled": put("pooled_projections", lambda pooled: pooled.roll(1, 0)),
}
FLUX2 = {
    "timestep": TIMESTEP,
    "rows and columns": TURNED,
    "other text": OTHER_TEXT,
    "text order": put("encoder_hidden_states", lambda text: text.roll(1, 1)),
    "text without ids": put("txt_ids", torch.zeros_like),
    "references at 1 and 2": time_ids(lambda t: t // 10),
    "references at 10 and 10": time_ids(lambda t: t.clamp(max=10)),
    "references from 0": time_ids(lambda t: (t - 10).clamp(min=0)),
    "references at 20 and 10": time_ids(lambda t: torch.where(t > 0, 30 - t, t)),
}
QWEN_T2I = {
    "timestep": TIMESTEP,
    "other text": OTHER_TEXT,
    "text order": put("encoder_hidden_states", lambda text: text.roll(1, 1)),
    "target turned": shapes(lambda one: [one[0][:1] + one[0][:0:-1], *one[1:]]),
    "no mask": put("encoder_hidden_states_mask", lambda mask: None),
}
QWEN_EDIT = QWEN_T2I | {"control turned": shapes(lambda one: [one[0], one[1][:1] + one[1][:0:-1], *one[2:]])}
QWEN_PLUS = QWEN_EDIT | {"shapes of controls swapped": shapes(lambda one: [one[0], one[2], one[1]])}
MUTATIONS: dict[tuple[str, int], dict[str, Callable[[Arguments], None]]] = {
    ("flux", 0): FLUX | {"guidance": GUIDANCE},
    ("flux_schnell", 0): FLUX,
    ("flux_kontext", 2): FLUX | {"guidance": GUIDANCE, "controls not counted": time_ids(lambda t: t.clamp(max=1))},
    ("flux2", 2): FLUX2 | {"guidance": GUIDANCE},
    ("flux2_klein", 2): FLUX2,
    ("qwen_image", 0): QWEN_T2I,
    ("qwen_image_edit", 1): QWEN_EDIT,
    ("qwen_image_edit_plus", 2): QWEN_PLUS,
    ("qwen_image_edit_plus_2511", 2): QWEN_PLUS,
}


@pytest.mark.parametrize(
    ("name", "count", "mutation"), [(*key, word) for key, words in MUTATIONS.items() for word in words]
)
def test_a_wrong_argument_shows(
    case: Callable[[str, int], Case], monkeypatch: pytest.MonkeyPatch, name: str, count: int, mutation: str
) -> None:
    here = case(name, count)
    changed(monkeypatch, here.trainer, MUTATIONS[name, count][mutation])
    assert here.difference([0, 1, 2], LEVELS // 2).relative > RED


@pytest.mark.parametrize("name", ["flux", "flux_schnell"])
def test_text_order_shows_in_the_arguments(
    case: Callable[[str, int], Case], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """This network sees no order among text tokens."""
    here = case(name, 0)
    monkeypatch.setattr(oracle, "encode_samples", lambda *_: here.encoded[:1])
    changed(monkeypatch, here.trainer, put("encoder_hidden_states", lambda text: text.roll(1, 1)))
    assert oracle.argument_difference(here.trainer, here.official, here.samples[0]).relative > RED


EDITS = [(name, min(2, counts[-1])) for name, counts in ROWS.items() if counts[-1]]


@pytest.mark.parametrize(("name", "count"), [pair for pair in EDITS if pair[1] > 1])
def test_controls_in_another_order_show(
    case: Callable[[str, int], Case], monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    here = case(name, count)
    changed(monkeypatch, here.trainer, batch=lambda given: replace(given, controls=given.controls[::-1]))
    assert here.difference([0], LEVELS // 2).relative > RED


def plain_vae(vae: Any) -> Any:
    """The same VAE without the statistics that normalise its latents."""
    plain = copy.deepcopy(vae)
    if hasattr(plain, "bn"):
        plain.bn.running_mean.zero_()
        plain.bn.running_var.fill_(1.0)
    elif "latents_mean" in plain.config and plain.config.latents_mean is not None:
        count = len(plain.config.latents_mean)
        plain.register_to_config(latents_mean=[0.0] * count, latents_std=[1.0] * count)
    else:
        plain.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    return plain


@pytest.mark.parametrize(("name", "count"), EDITS)
def test_missing_statistics_of_latents_show(case: Callable[[str, int], Case], name: str, count: int) -> None:
    here = case(name, count)
    parts = {**here.components, "vae": plain_vae(here.components["vae"])}
    wrong = replace(here, encoded=oracle.encode_samples(here.trainer, parts, here.samples[:1]))
    assert wrong.difference([0], LEVELS // 2).relative > RED


def official_latents(here: Case, image: Image.Image) -> torch.Tensor:
    """``[C, h, w]``: a picture's latents as an official pipeline of the family encodes a control."""
    import diffusers

    name = here.trainer.family.name
    parts = {key: here.official.get(key) for key in ("vae", "scheduler", "transformer", "text_encoder", "tokenizer")}
    if name.startswith("flux2"):
        pipe = getattr(diffusers, here.trainer.family.pipeline_class)(**parts)
        return pipe._encode_vae_image(image=pipe.image_processor.preprocess(image), generator=None)[0]
    if name.startswith("flux"):
        pipe = diffusers.FluxKontextPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
        return pipe._encode_vae_image(pipe.image_processor.preprocess(image), None)[0]
    pipe = diffusers.QwenImageEditPipeline(**parts, processor=None)
    return pipe._encode_vae_image(pipe.image_processor.preprocess(image).unsqueeze(2), None)[0, :, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_latents_are_the_pipelines(case: Callable[[str, int], Case], name: str) -> None:
    here = case(name, ROWS[name][-1])
    one, encoded = here.samples[0], here.encoded[0]
    for image, latents in zip([one.target, *one.controls], [encoded.target, *encoded.controls], strict=True):
        assert torch.equal(latents, official_latents(here, image))
    plain = here.trainer.encode({"vae": plain_vae(here.components["vae"])}, one)
    assert Difference.of(plain.target, encoded.target).relative > RED


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "flux2", "flux2_klein", "qwen_image", "qwen_image_edit"])
def test_posterior_is_the_pipelines(
    tiny: Callable[[str], Any], case: Callable[[str, int], Case], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Mode and standard deviation give what the pipeline would normalise if it drew from the posterior."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    here = case(name, ROWS[name][-1])
    trainer = tiny(name).make("data.vae_posterior=sample")
    encoded = trainer.encode({"vae": here.components["vae"]}, here.samples[0])
    draws: list[torch.Tensor] = []

    def drawn(self: Any) -> torch.Tensor:
        draws.append(torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(0)))
        return self.mean + self.std * draws[-1]

    monkeypatch.setattr(DiagonalGaussianDistribution, "mode", drawn)
    expected = official_latents(here, here.samples[0].target)
    noise = draws[0][0]
    noise = here.trainer._patches(noise[None])[0] if name.startswith("flux2") else noise.reshape(encoded.target.shape)
    assert torch.allclose(encoded.target + encoded.target_std * noise, expected, atol=1e-5)
    assert (encoded.target_std * noise).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prompt", [*CAPTIONS, "segment the shape " * 40], ids=["short", "empty", "long", "too long"])
@pytest.mark.parametrize("name", ROWS)
def test_text_is_the_pipelines(case: Callable[[str, int], Case], name: str, prompt: str) -> None:
    """By the official pipeline's own ``encode_prompt`` with its whole text encoder and its processor."""
    here = case(name, ROWS[name][-1])
    one = replace(here.samples[0], prompt=prompt)
    parts = {key: part for key, part in here.components.items() if key not in ("vae", "transformer", "scheduler")}
    text = here.trainer.encode(parts, one).text
    if name.startswith("flux_") or name == "flux":
        found, pooled, _ = here.pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=64)
        assert torch.equal(text["pooled_prompt_embeds"], pooled[0])
    elif name.startswith("qwen_image_edit"):
        pictures = one.text_controls if "plus" in name else one.controls[0]
        found, mask = here.pipe.encode_prompt(prompt=prompt, image=pictures)
        assert mask is None
    else:
        found = here.pipe.encode_prompt(prompt=prompt, max_sequence_length=64)[0]
    assert torch.equal(text["prompt_embeds"], found[0])


@pytest.mark.parametrize(("name", "layers"), [("flux2", 31), ("flux2_klein", 28)])
def test_text_encoders_lack_the_layers_that_nobody_reads(tiny: Callable[[str], Any], name: str, layers: int) -> None:
    one = tiny(name)
    depths = [
        parts["text_encoder"].config.get_text_config().num_hidden_layers for parts in (one.components, one.official)
    ]
    assert depths[0] == layers < depths[1]


@torch.no_grad()
@pytest.mark.parametrize("name", QWEN)
def test_padded_text_is_unpadded_text(
    case: Callable[[str, int], Case], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Three captions of different length as one batch, each alone, and with rubbish where the padding is."""
    here = case(name, ROWS[name][-1])
    network = here.components["transformer"]

    def predict(chosen: list[int], rubbish: float = 0.0) -> torch.Tensor:
        batch = collate([here.encoded[i] for i in chosen], [(0, i) for i in chosen])
        if rubbish:
            padding = batch.text["prompt_embeds_mask"] == 0
            assert padding.any()
            batch.text["prompt_embeds"][padding] = rubbish
        draws = [torch.randn(batch.target.shape[1:], generator=torch.Generator().manual_seed(i)) for i in chosen]
        noised = Noised(torch.stack(draws), torch.full([len(chosen)], 0.6), batch.target)
        return here.trainer.predict(network, noised, batch)

    together = predict([0, 1, 2])
    alone = torch.cat([predict([i]) for i in range(3)])
    for found, expected in zip(together, alone, strict=True):
        assert Difference.of(found, expected).relative <= TIGHT
    assert Difference.of(predict([0, 1, 2], rubbish=100.0), together).relative <= TIGHT
    changed(monkeypatch, here.trainer, put("encoder_hidden_states_mask", lambda mask: None))
    assert Difference.of(predict([0, 1, 2]), alone).relative > RED
