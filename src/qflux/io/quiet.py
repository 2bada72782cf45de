"""Import heavy libraries without their banners, warnings and log lines."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_LOGGERS = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "diffusers": "DIFFUSERS_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "bitsandbytes": "",
    "DeepSpeed": "",
    "torchao": "",
}


_one_thread = threading.RLock()


class _Muted:
    """Stands for ``sys.stdout`` or ``sys.stderr``: drops text while muted, later passes it to the stream of that name.

    A library that keeps the stream it saw at import (a log handler does) goes on to work after the block.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown = getattr(sys, name)
        self.muted = True

    def _stream(self) -> Any:
        return self._shown if self.muted else getattr(sys, self._name)

    def write(self, text: str) -> int:
        return len(text) if self.muted else self._stream().write(text)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream(), attribute)


@contextmanager
def _muted_stream(name: str) -> Iterator[None]:
    shown = getattr(sys, name)
    proxy = _Muted(name)
    setattr(sys, name, proxy)
    try:
        yield
    finally:
        setattr(sys, name, shown)
        proxy.muted = False


def _flush() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]


@contextmanager
def _muted_descriptor(number: int) -> Iterator[None]:
    """Send what compiled code and child processes write to descriptor ``number`` nowhere."""
    _flush()
    try:
        saved = os.dup(number)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
    try:
        yield
    finally:
        _flush()
        os.dup2(saved, number)
        os.close(saved)


@contextmanager
def _environment() -> Iterator[None]:
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _silent_logging() -> Iterator[None]:
    root = logging.root
    disabled, level, handlers = root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
        for name, variable in _LOGGERS.items():
            if variable not in os.environ:
                logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence warnings, logging, stdout and stderr for the block, then restore them.

    Verbosity variables of the libraries are set for the block where the user has not set them. What stays is only the
    level ERROR of those libraries' loggers. Exceptions pass unchanged. Streams and logging belong to the whole process,
    so threads enter one after the other.
    """
    with _one_thread, ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_silent_logging())
        stack.enter_context(_environment())
        for number in (1, 2):
            stack.enter_context(_muted_descriptor(number))
        for name in ("stdout", "stderr"):
            stack.enter_context(_muted_stream(name))
        yield
