"""Run a test's function in several processes that form one gloo group on the CPU, as a launcher would start them.

``run(work, *args, folder=tmp_path)`` calls ``work(rank, *args)`` in each process and returns what each returned, a tree
of dicts, lists, numbers, strings and tensors. Arguments are JSON values or paths. Nothing waits longer than the
deadline: a process that hangs says where, the others are ended, and what they said is in the error.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
GRACE = 5.0  # seconds that the others have to end after one process failed
_SHOWN = 4000  # characters of a failed process's output


def run(
    work: Callable[..., Any],
    *args: Any,
    folder: Path,
    processes: int = 2,
    deadline: float = 60.0,
    join: bool = True,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """What ``work(rank, *args)`` returned in each process, by rank; ``work`` is a function at a module's top.

    ``join`` forms the group before ``work`` is called; else ``work`` does, from the environment that launchers set.
    """
    import torch.distributed as dist

    from qflux.io.codec import load_state

    folder = folder / f"processes-{len(list(folder.glob('processes-*')))}"
    folder.mkdir(parents=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port
    place = f"{inspect.getsourcefile(work)}:{work.__qualname__}"
    told = json.dumps({"args": args, "deadline": deadline, "join": join, "folder": str(folder)}, default=str)
    began, started = time.monotonic(), []
    try:
        for rank in range(processes):
            own = _environment(rank, processes, store.port) | dict(environment or {})
            with (folder / f"{rank}.txt").open("w") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, __file__, place, told],
                        env={**os.environ, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = _wait(started, began + deadline + GRACE)
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(codes):
        said = "\n".join(f"-- process {r}, exit code {c}\n{_said(folder, r)}" for r, c in enumerate(codes))
        raise AssertionError(f"{work.__qualname__} failed\n{said}")
    return [load_state(folder, f"{rank}") for rank in range(processes)]


def said(folder: Path, rank: int = 0) -> str:
    """What a process of the last run in ``folder`` printed."""
    return (folder / f"processes-{len(list(folder.glob('processes-*'))) - 1}" / f"{rank}.txt").read_text()


def _said(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text(errors="replace")[-_SHOWN:]


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    paths = [str(TESTS), *(path for path in sys.path if path)]
    return {
        **{name: str(number) for name, number in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's, as under torchrun
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }


def _wait(started: Sequence[subprocess.Popen[bytes]], end: float) -> list[int | None]:
    """Exit codes, None of those that had to be ended; after a failure the others are not waited for long."""
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        if any(process.returncode for process in started):
            end = min(end, time.monotonic() + GRACE)
        time.sleep(0.02)
    return [-9 if process.poll() is None else process.returncode for process in started]


def _main(place: str, told: str) -> None:
    """A child: call the function, write what it returns."""
    given = json.loads(told)
    faulthandler.dump_traceback_later(given["deadline"], exit=True)
    import torch
    import torch.distributed as dist

    from qflux.io.codec import save_state

    torch.set_num_threads(1)
    if given["join"]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=given["deadline"]))
    file, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rank = int(os.environ["RANK"])
    save_state(Path(given["folder"]), f"{rank}", getattr(module, name)(rank, *given["args"]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
