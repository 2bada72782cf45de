"""What a run tells while it runs: metrics.jsonl always, and the trackers named in ``logging.report_to``.

All values arrive as plain Python numbers, and nothing else is taken: reading one from a device would be a hidden
wait.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.errors import NoSpace, UserError, described
from qflux.io import atomic
from qflux.io.faults import reach
from qflux.io.progress import say
from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from PIL import Image

METRICS = "metrics.jsonl"
_INSTALL = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install 'qflux[wandb]'",
    "swanlab": "pip install swanlab",
    "trackio": "pip install trackio",
}


def check_trackers(names: Iterable[str]) -> None:
    """UserError for every tracker of ``logging.report_to`` that is not installed; imports none of them."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            *(f"logging.report_to: {name} is not installed; {_INSTALL[name]}, or take it out" for name in missing)
        )


class Tracker:
    """Writes metrics.jsonl and feeds the trackers; on other processes than the first it does nothing.

    ``start_step`` is the step a resumed run continues from. A tracker that fails is reported once and switched off; a
    full disk raises NoSpace, but not in ``close``. Raises UserError for trackers that are not installed.
    """

    def __init__(self, run_dir: Path, config: Any, main: bool, start_step: int = 0) -> None:
        self._file: atomic.Lines | None = None
        self._trackers: dict[str, Any] = {}
        if not main:
            return
        check_trackers(config.logging.report_to)
        self._path = Path(run_dir) / METRICS
        self._file = atomic.Lines(self._path)
        self._threads, threading.excepthook = threading.excepthook, self._thread_failed
        for name in config.logging.report_to:
            try:
                self._trackers[name] = _start(name, Path(run_dir), config, start_step)
            except Exception as error:
                self._failed(name, error)

    def log(self, step: int, **values: float | int | None) -> None:
        """One line of training metrics of optimizer step ``step``; not-finite numbers are written as null."""
        self._line({"step": step, **values})
        self._each(lambda tracker: tracker.log(_numbers(values), step=step))

    def log_held_out(self, step: int, loss: float, per_sigma: Mapping[Any, float]) -> None:
        """One held-out line: the mean loss, and ``per_sigma``: a sigma (or a name of a bin) → its loss."""
        bins = {_label(key): value for key, value in per_sigma.items()}
        self._line({"step": step, "val_loss": loss, "val_loss_sigma": bins})
        flat = {"val_loss": loss, **{f"val_loss_sigma/{key}": value for key, value in bins.items()}}
        self._each(lambda tracker: tracker.log(_numbers(flat), step=step))

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Pictures by name, for the trackers that show pictures."""

        def send(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                import numpy

                for name, image in images.items():
                    pixels = numpy.asarray(image.convert("RGB"))[None]
                    tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [image] for name, image in images.items()}, step=step)

        self._each(send)

    def close(self) -> None:
        """Finish all trackers and close the file; may be called twice."""
        self._each(lambda tracker: tracker.finish(), closing=True)
        self._trackers.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
            threading.excepthook = self._threads

    def __enter__(self) -> Tracker:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _line(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        reach("metrics.before")
        self._file.add(json.dumps(_plain(record), allow_nan=False))
        reach("metrics.after")

    def _each(self, action: Callable[[Any], None], closing: bool = False) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                self._failed(name, error, closing)

    def _failed(self, name: str, error: Exception, closing: bool = False) -> None:
        """Switch a tracker off; a full disk ends the run."""
        self._trackers.pop(name, None)
        full = atomic.disk_error(error, self._path.parent)
        if isinstance(full, NoSpace) and not closing:
            raise full from error
        say(f"tracker {name} failed and is switched off, {METRICS} goes on: {described(error)}")

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """A tracker's own thread cannot write: the tracker raises it at its next call, a trace tells no more."""
        if args.exc_value is None or atomic.disk_error(args.exc_value) is None:
            self._threads(args)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a line torn by a crash is left out. A missing file has none."""
    return [record for _, record in _records(path)]


def trim_metrics(path: Path, step: int) -> None:
    """Rewrite a metrics.jsonl, atomically, without lines of steps after ``step`` and without torn ones."""
    path = Path(path)
    if not path.exists():
        return
    kept = "".join(line + "\n" for line, record in _records(path) if record["step"] <= step)
    if kept.encode() != path.read_bytes():
        atomic.write_text(path, kept)


def _records(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    text = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def _start(name: str, run_dir: Path, config: Any, start_step: int) -> Any:
    """An accelerate tracker, started, without an Accelerator."""
    with quiet_imports():
        from accelerate import tracking

        # Accelerate's logger refuses to speak before an Accelerator exists; these classes only send debug lines to it.
        tracking.logger = logging.getLogger(tracking.__name__)
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        project = config.logging.tracker_project_name
        if name == "tensorboard":
            # purge_step hides what a killed run had logged after the checkpoint
            tracker = kind("tensorboard", run_dir, purge_step=start_step + 1 if start_step else 0)
        elif name == "wandb":
            tracker = kind(project, name=run_dir.name, dir=str(run_dir))
        elif name == "swanlab":
            tracker = kind(project, experiment_name=run_dir.name, logdir=str(run_dir / "swanlab"))
        else:
            tracker = kind(project, name=run_dir.name)
        tracker.main_process_only = False  # we are the main process; asking Accelerate would set it up
        tracker.start()
        settings = _settings(run_dir)
        if settings and name == "tensorboard":
            tracker.log({"config": f"```yaml\n{settings}\n```"}, step=start_step)
        elif settings:
            tracker.store_init_configuration({"config": settings})
    return tracker


def _settings(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _label(key: Any) -> str:
    return f"{key:.6g}" if isinstance(key, float) else str(key)


def _plain(value: Any) -> Any:
    """JSON values only; a tensor would hide a wait for the device."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"metrics are plain numbers, got {type(value).__name__}")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}
