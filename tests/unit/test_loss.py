"""The path, the noise levels and the edit-mask loss, as identities and against diffusers called live."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch.nn import functional

from qflux.data.feeder import collate, feed
from qflux.loss.edit_mask_loss import mask_to_grid, mask_weights
from qflux.loss.flow_matching import add_noise, draw_noise, draw_sigmas, flow_matching_loss, shift_sigmas
from qflux.types import EncodedSample, Micro, Resize, SizePlan, Step

PLAN = SizePlan(Resize((0, 0, 32, 32), (32, 32)))


def sample(i=0, mask=True):
    draw = torch.Generator().manual_seed(i)
    grid = torch.rand(2, 2, generator=draw) if mask else None
    return EncodedSample(torch.randn(16, 4, 4, generator=draw), [], {"t": torch.ones(3)}, grid, PLAN)


def batch_of(positions, **options):
    return collate([sample(i, **options) for _, i in positions], positions)


def loss_config(**options):
    defaults = {"name": "mse", "huber_delta": 0.1, "mask_loss": True, "foreground_weight": 2.0,
                "background_weight": 1.0, "normalize": False}  # fmt: skip
    return SimpleNamespace(**defaults | options)


def sigma_config(**options):
    defaults = {"sampling": "uniform", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "weighting": "none"}
    return SimpleNamespace(**defaults | options)


def test_path_ends_and_velocity():
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(add_noise(x, noise, torch.ones(2)).x_t, noise)
    near, far = (add_noise(x, noise, torch.full((2,), s)).x_t for s in (0.25, 0.75))
    assert torch.allclose((far - near) / 0.5, add_noise(x, noise, torch.ones(2)).target, atol=1e-5)


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_shift_is_the_schedulers(mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    plain = torch.linspace(1, 0.125, 8)
    scheduler.set_timesteps(sigmas=plain.tolist(), mu=mu)
    assert torch.allclose(shift_sigmas(plain, torch.tensor(mu).exp()), scheduler.sigmas[:-1], atol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_sigmas_belong_to_samples_not_to_batches(sampling):
    positions = [(0, 4), (2, 9), (1, 4)]
    config = sigma_config(sampling=sampling)
    together = draw_sigmas(config, batch_of(positions), 7, 1.0)
    alone = torch.cat([draw_sigmas(config, batch_of([p]), 7, 1.0) for p in positions])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == 3
    many = draw_sigmas(config, batch_of([(0, i) for i in range(400)]), 7, 1.0)
    assert 0 < many.min() <= many.max() <= 1
    assert 0.4 < many.mean() < 0.6


def test_a_positive_logit_mean_is_less_noise():
    config = sigma_config(sampling="logit_normal", logit_mean=1.0)
    sigmas = draw_sigmas(config, batch_of([(0, i) for i in range(300)]), 7, 1.0)
    assert torch.logit(sigmas).mean() == pytest.approx(-1.0, abs=0.2)


def test_noise_belongs_to_samples():
    positions = [(0, 4), (2, 9)]
    assert torch.equal(draw_noise(batch_of(positions), 7)[1], draw_noise(batch_of([(2, 9)]), 7)[0])


def test_mask_grid_and_weights():
    mask = torch.zeros(32, 32)
    mask[0, 0] = 1.0
    grid = mask_to_grid(mask, 8, 2)
    assert grid.shape == (2, 2)
    assert grid[0, 0] == 1 / 64, "mean over 8x8, then the largest of 2x2"
    assert grid.sum() == grid[0, 0]
    weights = mask_weights(torch.tensor([[[1.0, 0.25], [torch.nan, 0.0]]]), 2.0, 1.0, 4)
    assert weights.shape == (1, 1, 4, 4)
    assert weights[0, 0, ::2, ::2].tolist() == [[2.0, 1.25], [1.0, 1.0]]


@pytest.mark.parametrize("name", ["mse", "huber"])
@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_loss_by_its_formula(name, weighting):
    positions = [(0, 0), (0, 1)]
    batch = batch_of(positions)
    noised = add_noise(batch.target, draw_noise(batch, 1), torch.tensor([0.3, 0.8]))
    prediction = torch.randn_like(noised.target)
    got = flow_matching_loss(prediction, noised, batch.edit_mask, loss_config(name=name), weighting)
    for b in range(2):
        error = (prediction[b] - noised.target[b]) ** 2
        if name == "huber":
            error = 2 * functional.huber_loss(prediction[b], noised.target[b], reduction="none", delta=0.1)
        omega = 1.0 if weighting == "none" else compute_loss_weighting_for_sd3(weighting, noised.sigma)[b]
        by_hand = sum(
            error[c, y, x] * omega * (1 + batch.edit_mask[b, y // 2, x // 2])
            for c in range(16) for y in range(4) for x in range(4)
        ) / (16 * 4 * 4)  # fmt: skip
        assert got[b] == pytest.approx(by_hand.item(), rel=1e-5)


def test_normalised_masks_weigh_samples_alike():
    noised = add_noise(torch.zeros(2, 16, 4, 4), torch.ones(2, 16, 4, 4), torch.ones(2))
    masks = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
    prediction = torch.zeros(2, 16, 4, 4)
    plain = flow_matching_loss(prediction, noised, masks, loss_config(), "none")
    even = flow_matching_loss(prediction, noised, masks, loss_config(normalize=True), "none")
    assert plain.tolist() == [2.0, 1.25]
    assert even.tolist() == [1.0, 1.0]


def test_a_sample_without_a_mask_weighs_one():
    batch = collate([sample(0), sample(1, mask=False)], [(0, 0), (0, 1)])
    noised = add_noise(torch.zeros(2, 16, 4, 4), torch.ones(2, 16, 4, 4), torch.ones(2))
    losses = flow_matching_loss(torch.zeros(2, 16, 4, 4), noised, batch.edit_mask, loss_config(), "none")
    assert losses[1] == 1
    assert losses[0] > 1
    assert collate([sample(0, mask=False)], [(0, 0)]).edit_mask is None


def with_text(*lengths, pooled=True):
    texts = []
    for i, length in enumerate(lengths):
        draw = torch.Generator().manual_seed(i)
        texts.append({"words": torch.randn(length, 5, generator=draw).bfloat16()})
        texts[-1] |= {"pooled": torch.randn(7, generator=draw)} if pooled else {}
    return [replace(sample(i), text=text) for i, text in enumerate(texts)]


def test_text_of_different_length_is_padded_with_a_mask_beside_it():
    samples = with_text(2, 4, 0)
    text = collate(samples, [(0, 0), (0, 1), (0, 2)]).text
    assert text.keys() == {"words", "words_mask", "pooled"}
    assert (text["words"].shape, text["words"].dtype) == ((3, 4, 5), torch.bfloat16)
    assert text["words_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert text["words_mask"].dtype == torch.long
    for row, one in zip(text["words"], samples, strict=True):
        length = len(one.text["words"])
        assert torch.equal(row[:length], one.text["words"])
        assert not row[length:].any()
    assert torch.equal(text["pooled"], torch.stack([one.text["pooled"] for one in samples]))


@pytest.mark.parametrize("lengths", [(3,), (3, 3)])
def test_text_of_one_length_has_no_mask(lengths):
    samples = with_text(*lengths, pooled=False)
    text = collate(samples, [(0, i) for i in range(len(lengths))]).text
    assert text.keys() == {"words"}
    assert torch.equal(text["words"], torch.stack([one.text["words"] for one in samples]))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_changes_nothing(workers):
    steps = [Step(k, (Micro(((0, k), (0, k + 1)), 0.5), Micro(((0, k + 2),), 0.25))) for k in range(6)]
    fed = list(feed(iter(steps), lambda epoch, index: sample(index), workers))
    assert [step for step, _ in fed] == steps
    for step, batches in fed:
        for micro, batch in zip(step.micros, batches, strict=True):
            assert batch.index == tuple(index for _, index in micro.positions)
            assert torch.equal(batch.target, torch.stack([sample(i).target for i in batch.index]))


def test_an_error_while_reading_ahead_is_raised():
    def read(epoch, index):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(feed(iter([Step(0, (Micro(((0, 0),), 1.0),))]), read, 2))
