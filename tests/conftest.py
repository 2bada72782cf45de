"""What all tests share: no network, one thread, torch's global state put back, the tiny model, the command line."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from house_rules import read_budgets

ROOT = Path(__file__).resolve().parent.parent

# Before torch and the hub's client are imported: both read these once. Subprocesses inherit them.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
_own_home = "PYTEST_XDIST_WORKER" not in os.environ
if _own_home:  # a test neither reads the user's token nor fills the user's cache; xdist's workers inherit the folder
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="qflux-tests-hub-")


def pytest_unconfigure() -> None:
    """Remove the hub folder of this run."""
    if _own_home:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def _is_loopback(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _refuse(host: object) -> None:
    raise OSError(f"tests have no network: refused {host!r}")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and name look-ups beyond this machine fail at once."""

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                _refuse(address[0])
            return original(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_loopback(host):
            _refuse(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guard(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def _reset_torch() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = False


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    """Torch's process-wide switches are the same before every test; a test that needs no torch does not load it."""
    _reset_torch()
    yield
    _reset_torch()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer model in diffusers' layout; read it, never write into it."""
    from qflux.demo.tiny_models import build_flux_kontext_random

    folder = tmp_path_factory.mktemp("tiny_model") / "model"
    build_flux_kontext_random(folder, seed=0)
    return folder


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_cli(args, **env)`` runs ``python -m qflux.main ARGS`` in ``tmp_path``; text output, no standard input."""

    def run(args: Sequence[object], **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qflux.main", *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the seconds that each test folder took, summed over processes, against its budget."""
    spent: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                spent["/".join(report.nodeid.split("/")[:2])] += report.duration
    page = ROOT / "CONTRIBUTING.md"
    budgets = read_budgets(page.read_text()) if page.exists() else {}
    for folder, budget in budgets.items():
        if folder in spent:
            verdict = "within" if spent[folder] <= budget or budget == 0 else "OVER"
            terminalreporter.write_line(f"{folder}: {spent[folder]:.0f} s of {budget} s, {verdict} budget")
