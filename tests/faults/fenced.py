"""Makes what looks at a run fail: where, with what, and the words that must tell of it."""

from __future__ import annotations

import errno
import json
import queue
import struct
import subprocess
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image, UnidentifiedImageError

from qflux.errors import UserError
from qflux.io.quiet import quiet_imports
from qflux.models import adapters
from qflux.models.ema import Ema
from qflux.trainer import loop, sampling
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer
from qflux.validation import held_out, validation_sampler

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.25 GiB\nmore text\n\nand more"
TOLD = ("sampling: stopped by", "held-out loss: not measured,", r"tracker \w+ failed", "report: not written,")
LINE = rf"(\[process \d\] )?({'|'.join(TOLD)}) .+"


class Mute(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise ValueError("no text")


def diffusers() -> Any:
    with quiet_imports():
        import diffusers
    return diffusers


def loading(component: str) -> Callable[[pytest.MonkeyPatch, BaseException], None]:
    """The trainer's ``load`` fails at a component that drawing needs; encoders of the cache are loaded before."""

    def plant(patch: pytest.MonkeyPatch, error: BaseException) -> None:
        original = FluxKontextTrainer.load

        def load(self: Any, name: str) -> Any:
            if name == component:
                raise error
            return original(self, name)

        patch.setattr(FluxKontextTrainer, "load", load)

    return plant


def calling(
    owner: Callable[[], Any], name: str, at: int = 0
) -> Callable[[pytest.MonkeyPatch, BaseException], list[int]]:
    """Every call of ``owner().name`` fails, or only the ``at``-th; planting it gives a list of those that failed."""

    def plant(patch: pytest.MonkeyPatch, error: BaseException) -> list[int]:
        calls, original, failed = [0], getattr(owner(), name), list[int]()

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if at in (0, calls[0]):
                failed.append(calls[0])
                raise error
            return original(*args, **kwargs)

        patch.setattr(owner(), name, fail)
        return failed

    return plant


def in_network(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The network fails in its second block while a picture is drawn: gradients are off then."""
    owner = diffusers().models.transformers.transformer_flux.FluxSingleTransformerBlock
    original = owner.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise error
        return original(self, *args, **kwargs)

    patch.setattr(owner, "forward", forward)


def pipeline() -> Any:
    return diffusers().FluxKontextPipeline


def vae() -> Any:
    return diffusers().AutoencoderKL


def tracker() -> Any:
    return __import__("accelerate.tracking").tracking.TensorBoardTracker


# name → (where it is looked up, the function that fails)
PLACES: dict[str, tuple[Callable[[], Any], str]] = {
    "samples": (lambda: sampling, "validation_samples"),
    "load": (lambda: sampling, "load_drawing_parts"),
    "build": (lambda: FluxKontextTrainer, "pipeline"),
    "call-kwargs": (lambda: FluxKontextTrainer, "call_kwargs"),
    "pipeline": (pipeline, "__call__"),
    "vae-encode": (vae, "encode"),
    "vae-decode": (vae, "decode"),
    "draw": (lambda: validation_sampler, "draw_picture"),
    "png": (lambda: validation_sampler, "write_png"),
    "png-folder": (lambda: validation_sampler, "sweep"),
    "sheet": (lambda: validation_sampler, "contact_sheet"),
    "scores": (lambda: validation_sampler, "write_json"),
    "held-out-loss": (lambda: held_out.HeldOut, "_sample"),
    "held-out-read": (lambda: held_out, "collate"),
    "average": (lambda: Ema, "swapped"),
    "mode": (lambda: sampling, "eval_mode"),
    "rounding": (lambda: adapters, "rounded_copy"),
    "tracker-start": (tracker, "start"),
    "tracker-log": (tracker, "log"),
    "tracker": (tracker, "log_images"),
    "tracker-end": (tracker, "finish"),
    "report": (lambda: loop, "write_report"),
}
# (type of an error, what it is made of ...)
ERRORS: list[tuple[Any, ...]] = [
    (Exception,), (AssertionError,), (AttributeError, "no such"), (BufferError, "held"), (EOFError,), (Mute,),
    (ExceptionGroup, "several", [ValueError("one"), KeyError("two")]), (FloatingPointError, "underflow"),
    (ImportError, "no module"), (IndexError, "out of range"), (KeyError, "size"), (KeyError,), (LookupError,),
    (MemoryError,), (MemoryError, "no room"), (torch.OutOfMemoryError, CUDA), (torch.OutOfMemoryError,),
    (NotImplementedError,), (OverflowError, "too large"), (RecursionError, "maximum depth"), (ReferenceError, "gone"),
    (RuntimeError, "CUDA error: device-side assert"), (RuntimeError,), (StopIteration, 3), (StopIteration,),
    (StopAsyncIteration,), (SyntaxError, "in a template"), (SystemError, "null"), (TypeError, "not a tensor"),
    (UnicodeDecodeError, "utf-8", b"\xff", 0, 1, "invalid start byte"), (ValueError,), (ValueError, "\n\n  b \nc"),
    (ValueError, "10%\r20%\r"), (ValueError, "[bold]{0} %s \\n"), (ValueError, "long " * 20_000), (Warning, "old"),
    (ZeroDivisionError, "by zero"), (OSError, errno.EIO, "Input/output error"), (OSError, "no number"), (OSError,),
    (PermissionError, errno.EACCES, "denied", "/of/others"), (FileNotFoundError, errno.ENOENT, "gone", "\udcff.png"),
    (ConnectionResetError, errno.ECONNRESET, "reset"), (BrokenPipeError, errno.EPIPE, "pipe"), (TimeoutError, "slow"),
    (json.JSONDecodeError, "Expecting value", "{", 1), (zipfile.BadZipFile, "no zip"), (struct.error, "4 bytes"),
    (UnidentifiedImageError, "no picture"), (Image.DecompressionBombError, "too large"),
    (subprocess.CalledProcessError, 1, ["tool"]), (queue.Empty,),
]  # fmt: skip

# name → (where it fails, with what, the words of the line that tells of it)
FAILURES: dict[str, tuple[Callable[[pytest.MonkeyPatch, BaseException], object], BaseException, str]] = {
    "load-vae-memory": (loading("vae"), torch.OutOfMemoryError(CUDA), "OutOfMemoryError: CUDA out of memory"),
    "load-vae-cuda": (loading("vae"), RuntimeError("CUDA error: device-side assert"), "RuntimeError: CUDA error"),
    "load-scheduler": (loading("scheduler"), OSError(errno.EIO, "Input/output error"), "OSError: "),
    "encode-prompt": (calling(*PLACES["samples"]), MemoryError(), "MemoryError: no message"),
    "build-pipeline": (calling(*PLACES["build"]), ValueError("no such part"), "ValueError: no "),
    "call-kwargs": (calling(*PLACES["call-kwargs"]), KeyError("size"), "KeyError: 'size'"),
    "pipeline-memory": (calling(*PLACES["pipeline"]), torch.OutOfMemoryError(CUDA), "OutOfMemoryError: CUDA out"),
    "pipeline-no-text": (calling(*PLACES["pipeline"]), RuntimeError(), "RuntimeError: no message"),
    "pipeline-mute": (calling(*PLACES["pipeline"]), Mute(), "Mute: no message"),
    "pipeline-recursion": (calling(*PLACES["pipeline"]), RecursionError("maximum depth"), "RecursionError: maximum"),
    "pipeline-iteration": (calling(*PLACES["pipeline"]), StopIteration(3), "StopIteration: 3"),
    "second-picture": (calling(*PLACES["pipeline"], at=2), AssertionError("shapes"), "AssertionError: shapes"),
    "network": (in_network, torch.OutOfMemoryError(CUDA), "OutOfMemoryError: CUDA out"),
    "vae-encode": (calling(*PLACES["vae-encode"]), torch.OutOfMemoryError(CUDA), "OutOfMemoryError: CUDA out"),
    "vae-decode": (calling(*PLACES["vae-decode"]), torch.OutOfMemoryError(CUDA), "OutOfMemoryError: CUDA out"),
    "png": (calling(*PLACES["png"]), OSError(errno.EIO, "Input/output error"), "OSError: "),
    "png-folder": (calling(*PLACES["png-folder"]), PermissionError(13, "denied"), "PermissionError: "),
    "sheet": (calling(*PLACES["sheet"]), ZeroDivisionError("by zero"), "ZeroDivisionError"),
    "scores": (calling(*PLACES["scores"]), ValueError("not JSON"), "ValueError: not JSON"),
    "held-out-loss": (calling(*PLACES["held-out-loss"]), torch.OutOfMemoryError(CUDA), "OutOfMemoryError"),
    "held-out-read": (calling(*PLACES["held-out-read"]), UserError("one entry is gone", "two"), "UserError: one "),
    "average-copy": (calling(*PLACES["average"]), torch.OutOfMemoryError(CUDA), "OutOfMemoryError: CUDA out"),
    "rounding": (calling(*PLACES["rounding"]), MemoryError("no room"), "MemoryError: no room"),
    "tracker": (
        calling(*PLACES["tracker"]),
        ConnectionError("gone"),
        "ConnectionError: gone",
    ),
    "report": (calling(*PLACES["report"]), Mute(), "report: not written, Mute: no message"),
}
