"""The plan at the start of a run whose network is split: told for its devices, refused before anything loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qflux.config import Config
from qflux.errors import UserError
from qflux.main import import_trainer
from qflux.parallel import split_placement
from qflux.parallel.split_plan import SplitDevice
from qflux.tools.plan import make_plan
from qflux.tools.plan_start import check_plan, split_planner

GIB = 1 << 30
NOWHERE = Path("nowhere")


def config_of(validation=None, model=None, **train):
    return Config.model_validate({
        "model": {"pretrained_model_name_or_path": "black-forest-labs/FLUX.2-dev", "split_model_over_gpus": True,
                  **(model or {})},
        "data": {"dataset_path": "nowhere/data", "target_size": [512, 512]},
        "train": {"trainer": "Flux2", "gradient_checkpointing": "full", **train},
        "logging": {"validation": validation or {}},
    })  # fmt: skip


def drawn(size):
    return {"steps": 10, "samples": [{"prompt": "a", "size": [size, size]}]}


@pytest.fixture
def check(monkeypatch, capsys):
    """What ``check_plan`` prints of a config on GPUs with so many GiB free."""

    def run(config, *free):
        there = [SplitDevice(f"cuda:{i}", None if size is None else round(size * GIB)) for i, size in enumerate(free)]
        monkeypatch.setattr(split_placement, "split_devices", lambda names: there)
        capsys.readouterr()
        check_plan(config, import_trainer(config), [], NOWHERE)
        return capsys.readouterr().out.splitlines()

    return run


def refused(check, *args):
    with pytest.raises(UserError) as found:
        check(*args)
    return found.value.problems


def phases(lines):
    return [line.removeprefix("memory: ").partition(" needs about ")[0] for line in lines]


def test_what_the_split_takes_is_said_in_two_lines(check):
    lines = check(config_of(drawn(512)), 48, 60)
    told = r"plan: a device needs about 37\.\d GiB \(encoding: text_encoder on cuda:0: text_encoder 35\.4 GiB, "
    assert re.match(told, lines[0]), "it leaves the least of its device"
    assert re.search(r"; with the network split cuda:0 [\d.]+ GiB, cuda:1 [\d.]+ GiB\)$", lines[0])
    assert lines[1].startswith("plan: the disk holds ")
    assert len(lines) == 2
    assert not any("one device" in line for line in lines)


def test_an_encoder_too_large_for_the_first_device_is_refused(check):
    """The network itself would fit: blocks go where there is room."""
    config = config_of()
    (line,) = refused(check, config, 30, 60)
    assert re.match(r"memory: encoding: text_encoder needs about 3\d\.\d GiB on cuda:0, which has 30\.6 GiB; ", line)
    assert "; set model.quantize_text_encoders: quanto-fp8, or make the cache elsewhere" in line
    assert line.endswith(", or set train.memory_limit: none to try it all the same")
    assert len(check(config, 60, 30)) == 2, "only the first encodes"
    assert len(check(config_of(model={"quantize_text_encoders": True}), 30, 60)) == 2
    assert len(check(config_of(memory_limit="none"), 30, 60)) == 2


def test_drawing_too_large_for_a_device_is_refused(check):
    small, large = config_of(drawn(512)), config_of(drawn(3072))
    assert len(check(small, 40, 40)) == 2
    divided, *lines = refused(check, large, 40, 40)
    assert divided.startswith("model.split_model_strategy: auto does not fit 56 blocks on 2 devices: cuda:0 needs ")
    assert "(drawing samples)" in divided
    assert phases(lines) == ["drawing samples"]
    assert re.search(
        r" GiB on cuda:[01], which has 40\.6 GiB; .*, or leave logging\.validation\.samples out, or set", lines[0]
    )
    assert len(check(large, 60, 60)) == 2


def test_held_out_loss_and_saving_are_checked_too(check):
    full = {"model": {"lora": None}, "ema": {}}
    _, *lines = refused(check, config_of({"steps": 10, "held_out": "nowhere/held"}, **full), 240, 240)
    assert phases(lines) == ["training step", "held-out loss", "saving a checkpoint"]
    assert ", or leave logging.validation.held_out out, " in lines[1]
    assert all(re.search(r" on cuda:\d, which has 240\.6 GiB; ", line) for line in lines)


def test_each_phase_has_its_line_and_what_to_change_keeps_the_split(check):
    divided, *lines = refused(check, config_of(drawn(512), gradient_checkpointing="none"), 24, 24)
    assert divided.startswith("model.split_model_strategy: auto does not fit")
    expected = ["encoding: text_encoder", "training step", "drawing samples", "saving a checkpoint"]
    assert phases(lines) == expected
    assert all(re.search(r" needs about [\d.]+ GiB on cuda:\d, which has 24\.6 GiB; set ", line) for line in lines)
    assert "; set train.gradient_checkpointing: full and model.quantize: " in lines[1]
    assert not any(word in line for line in lines for word in ("offload_blocks", "cards", "over_gpus"))


def test_a_strategy_that_does_not_fit_where_auto_does(check):
    _, line = refused(check, config_of(model={"split_model_strategy": "contiguous"}), 40, 40)
    assert re.match(
        r"memory: training step needs about .* on cuda:1, .*; set model\.split_model_strategy: auto, or", line
    )


def test_an_amount_in_the_config_is_what_each_device_has(check):
    (line,) = refused(check, config_of(memory_limit="36GB"), 80, 80)
    assert line.startswith("memory: encoding: text_encoder needs about ")
    assert " on cuda:0, which has 36.0 GiB; " in line


def test_nothing_is_refused_where_nothing_is_known(check):
    assert len(check(config_of(drawn(4096)), None, None)) == 2


def test_a_rule_of_thumb_only_warns(check, monkeypatch):
    monkeypatch.setattr("qflux.tools.plan.Plan.rough", True)
    lines = check(config_of(), 30, 60)
    assert [line.startswith("plan: by a rule of thumb, memory: encoding: ") for line in lines] == [False] * 2 + [True]


def test_a_rule_of_thumb_refuses_no_split(check, monkeypatch):
    """Where no description of the network's blocks is there; nor does it when blocks are placed."""
    monkeypatch.setattr("qflux.tools.plan.section", lambda folder, name: None)
    config = config_of()
    lines = check(config, 20, 20)
    told = [line.removeprefix("plan: by a rule of thumb, ") for line in lines[2:]]
    assert phases(told) == ["encoding: text_encoder", "training step", "saving a checkpoint"]
    free = [SplitDevice("cuda:0", 20 * GIB), SplitDevice("cuda:1", 20 * GIB)]
    assert split_planner(config, import_trainer(config), [], NOWHERE)(free).fullest.share > 1
    assert make_plan(config, import_trainer(config), devices=free).problems == ()


def test_devices_that_are_not_there_are_refused_at_once():
    config = config_of(model={"split_devices": [f"cuda:{torch.cuda.device_count()}"]})
    with pytest.raises(UserError, match="but this machine has"):
        check_plan(config, import_trainer(config), [], NOWHERE)


def test_the_check_and_the_run_divide_alike(check, monkeypatch):
    """What is said at the start is the plan by which blocks are placed."""
    config = config_of(drawn(2048))
    seen = []
    monkeypatch.setattr("qflux.tools.plan_start.make_plan", lambda *a, **k: seen.append(make_plan(*a, **k)) or seen[-1])
    check(config, 48, 40)
    free = [SplitDevice("cuda:0", 48 * GIB), SplitDevice("cuda:1", 40 * GIB)]
    assert split_planner(config, import_trainer(config), [], NOWHERE)(free) == seen[0].split
