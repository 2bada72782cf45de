"""What only GPUs can tell of a split network, and of two processes with a GPU each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_networks import NETWORKS, lists, loss_of, network
from tiny_project import ROOT, WEIGHTS, Project, checkpoint, column, finish, record
from torch import Tensor

from qflux.io.tensors import load_tensors
from qflux.models.activations import named_blocks, set_checkpointing
from qflux.models.adapters import trainable
from qflux.parallel.split import apply_split

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPUS = torch.cuda.device_count()
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
SPLIT = ("model.split_model_over_gpus=true", "model.split_model_strategy=manual", "model.split_model_blocks=[2, 2]")
STEPS = ("data.batch_size=1", "train.gradient_accumulation_steps=4", "train.max_train_steps=3")
PAIRS = [
    ("cuda:0", "cuda:0"),
    ("cuda:0", "cpu"),
    pytest.param(("cuda:0", "cuda:1"), marks=needs_two),
]


def distance(one: Any, other: Any) -> float:
    """Largest difference of two runs' adapters after three steps."""
    a, b = (load_tensors(checkpoint(run, 3) / WEIGHTS) for run in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("devices", PAIRS, ids=str)
def test_a_split_run_is_the_run(project: Project, devices: tuple[str, str], at_once: int) -> None:
    """Between a GPU and the host products are rounded otherwise."""
    plain = project.train(*STEPS, name="plain")
    window = (f"model.split_devices=[{', '.join(devices)}]", f"model.split_micro_batches={at_once}")
    done = project.run(*STEPS, *SPLIT, *window, "logging.tracker_project_name=split")
    assert done.code == 0, done.out + done.err
    split = project.newest("split")
    precision = 1e-4 if "cpu" in devices else 1e-6
    assert column(split, "loss") == pytest.approx(column(plain, "loss"), rel=precision)
    assert distance(split, plain) <= (1e-3 if "cpu" in devices else 1e-6)


def trained(name: str, mode: Any, devices: tuple[str, str] | None) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """(losses, weights on the host, copies of a forward) of three steps on ``cuda:0`` or over devices."""
    model, copies, split = network(name), 0, None
    set_checkpointing(model, mode, lists(name))
    if devices is None:
        model.to("cuda:0")
    else:
        blocks = len(named_blocks(model, lists(name)))
        split = apply_split(model, lists(name), [2 * index // blocks for index in range(blocks)], devices)
    call = {k: v.to("cuda:0") if isinstance(v, Tensor) else v for k, v in NETWORKS[name][1]().items()}
    params, losses = trainable(model), []
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, foreach=False)
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, call)
        copies = copies if split is None else split.copies
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return losses, {name: param.detach().cpu() for name, param in params.items()}, copies


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("devices", PAIRS, ids=str)
def test_losses_and_copies(devices: tuple[str, str], mode: Any) -> None:
    losses, weights, _ = trained("flux2", mode, None)
    found, others, copies = trained("flux2", mode, devices)
    assert copies == (0 if devices[0] == devices[1] else 6)
    precision = 1e-4 if "cpu" in devices else 0
    torch.testing.assert_close(found, losses, rtol=precision, atol=precision)
    if not precision:
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@needs_two
@pytest.mark.parametrize("mode", ["none", "full"])
def test_copies_that_the_profiler_sees(mode: Any) -> None:
    """Large ones from GPU to GPU, in a step of one GPU twice and of two."""
    seen = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            trained("flux2", mode, devices)
        seen.append(sum("Memcpy PtoP" in event.name for event in profile.events()))
    assert seen[0] == 0
    assert seen[1] > 0


@needs_two
def test_two_processes_with_a_gpu_each_are_one(project: Project) -> None:
    """DDP over NCCL: two of one sample are one of two."""
    words = ("train.max_train_steps=3", "train.optimizer.lr=1e-4")
    one = project.train(*words, "data.batch_size=2", name="one")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "ddp.yaml")
    many = ("--num_processes", "2", "--main_process_port", "0", "-m", "qflux.main", "--config", project.config)
    last = ("data.batch_size=1", "logging.tracker_project_name=two")
    done = finish(project.spawn(*launcher, *many, *words, *last))
    assert done.code == 0, done.out + done.err
    two = project.newest("two")
    assert record(two)["device"].startswith("cuda")
    assert distance(one, two) <= 1e-5
