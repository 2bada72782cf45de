from __future__ import annotations

import math

import pytest
import torch

from qflux.config import SchedulerConfig
from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.models.schedules import make_schedule

with quiet_imports():
    from diffusers import optimization

LR, TOTAL = 3e-3, 40


def optimizer(lr=LR):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def curve(**settings):
    schedule = make_schedule(SchedulerConfig(**settings), optimizer(), TOTAL)
    values = []
    for _ in range(TOTAL + 3):
        values.append(schedule.lr())
        schedule.tick()
    return values


def reference(scheduler):
    values = []
    for _ in range(TOTAL + 3):
        values.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize(
    ("settings", "official"),
    [
        ({"name": "constant"}, {}),
        ({"name": "constant_with_warmup", "warmup_steps": 7}, {"num_warmup_steps": 7}),
        ({"name": "linear", "warmup_steps": 7}, {"num_warmup_steps": 7}),
        ({"name": "cosine", "warmup_steps": 7}, {"num_warmup_steps": 7}),
        (
            {"name": "cosine_with_restarts", "warmup_steps": 7, "num_cycles": 3},
            {"num_warmup_steps": 7, "num_cycles": 3},
        ),
        ({"name": "cosine_with_restarts"}, {"num_warmup_steps": 0}),
        ({"name": "polynomial", "warmup_steps": 7, "power": 2.0}, {"num_warmup_steps": 7, "power": 2.0}),
    ],
)
def test_equals_the_official_scheduler(settings, official):
    scheduler = optimization.get_scheduler(settings["name"], optimizer(), num_training_steps=TOTAL, **official)
    assert curve(**settings) == reference(scheduler)


def test_cycles_of_cosine_are_passed_on():
    scheduler = optimization.get_cosine_schedule_with_warmup(optimizer(), 0, TOTAL, num_cycles=1.5)
    assert curve(name="cosine", num_cycles=1.5) == reference(scheduler)
    assert curve(name="cosine", num_cycles=1.5) != curve(name="cosine")


def test_resume_sets_the_step():
    cfg = SchedulerConfig(name="cosine", warmup_steps=5)
    straight, before = (make_schedule(cfg, optimizer(), TOTAL) for _ in range(2))
    for _ in range(11):
        straight.tick()
        before.tick()
    state = before.state()
    assert state == {"step": 11}
    resumed_optimizer = optimizer()
    resumed = make_schedule(cfg, resumed_optimizer, TOTAL)
    resumed.load(state)
    assert resumed.last_epoch == 11
    for _ in range(5):
        assert resumed.lr() == straight.lr() == resumed_optimizer.param_groups[0]["lr"]
        resumed.tick()
        straight.tick()


def test_groups_keep_their_proportion():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5)]
    both = torch.optim.SGD(groups, lr=1.0)
    schedule = make_schedule(SchedulerConfig(name="linear"), both, 10)
    schedule.tick()
    assert [group["lr"] for group in both.param_groups] == [0.9, 0.45]


def test_the_step_of_the_optimizer_is_not_patched():
    plain = optimizer()
    make_schedule(SchedulerConfig(name="cosine"), plain, TOTAL)
    assert "step" not in vars(plain)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": "linear", "num_cycles": 2}, "num_cycles"),
        ({"name": "cosine", "power": 2.0}, "power"),
        ({"name": "polynomial", "warmup_steps": TOTAL}, "warmup_steps"),
        ({"name": "steps"}, "name"),
    ],
)
def test_settings_without_effect_are_refused(settings, key):
    cfg = SchedulerConfig().model_copy(update=settings)
    with pytest.raises(UserError, match=rf"train\.lr_scheduler\.{key}: "):
        make_schedule(cfg, optimizer(), TOTAL)


def test_polynomial_needs_room_to_fall():
    with pytest.raises(UserError, match=r"train\.optimizer\.lr"):
        make_schedule(SchedulerConfig(name="polynomial"), optimizer(1e-8), TOTAL)


def test_half_a_wave_ends_at_zero():
    assert curve(name="cosine")[TOTAL] == pytest.approx(0.0, abs=1e-12)
    assert curve(name="cosine")[TOTAL // 2] == pytest.approx(LR * 0.5 * (1 + math.cos(math.pi / 2)))
