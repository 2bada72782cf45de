"""The package's data agree with each other, and setup.sh keeps its promises without installing anything."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from house_rules import read_budgets
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version() -> None:
    import qflux

    version = (ROOT / "VERSION").read_text().strip()
    assert version == qflux.__version__ == importlib.metadata.version("qflux")


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and line[0] != "#"]
    return {str(canonicalize_name(name)): Version(version) for name, version in pairs}


def test_the_tested_set_covers_what_setup_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["dev"] + extras["optimizers"]:
        need = Requirement(text)
        assert pins()[canonicalize_name(need.name)] in need.specifier, text


def test_the_tested_set_fits_every_machine() -> None:
    # A local version such as 2.13.0+cpu, or a CUDA wheel, would tie the set to one kind of machine.
    assert pins()["torch"] == Version("2.13.0")
    assert not [name for name, version in pins().items() if version.local or re.match("nvidia|triton|cuda", name)]
    assert "qflux" not in pins()


@pytest.mark.skipif(not os.environ.get("CI"), reason="only a fresh environment has exactly the tested set")
def test_the_environment_is_the_tested_set() -> None:
    # Whoever imports setuptools puts the packages that it brings along on the path.
    found = [d for d in importlib.metadata.distributions() if "_vendor" not in str(d.locate_file(""))]
    installed = {str(canonicalize_name(d.name)): Version(d.version).public for d in found}
    assert {n: str(v) for n, v in pins().items() if n in installed} == {
        n: installed[n] for n in pins() if n in installed
    }


def test_entry_points_are_trainers() -> None:
    base_file = ROOT / "src/qflux/trainer/base_trainer.py"
    named = PROJECT["entry-points"]["qflux.trainers"]
    if not base_file.exists():
        pytest.skip("no base trainer")
    base = importlib.import_module("qflux.trainer.base_trainer").BaseTrainer
    for name, target in named.items():
        module, _, attribute = target.partition(":")
        assert issubclass(getattr(importlib.import_module(module), attribute), base), name


def test_the_licence_is_apache() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert (
        digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )  # the text as Apache publishes it


def test_single_config_starts_one_process() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        load_config_from_file(str(path))
    single = yaml.safe_load((ROOT / "accelerate_configs/single.yaml").read_text())
    assert (single["distributed_type"], single["num_processes"], single["mixed_precision"]) == ("NO", 1, "no")


def test_the_budget_table_is_read() -> None:
    budgets = read_budgets((ROOT / "CONTRIBUTING.md").read_text())
    assert budgets == {"tests/unit": 450, "tests/tiny": 1500, "tests/faults": 1500, "tests/gpu": 0}


STUB = """#!/usr/bin/env bash
# An environment's Python that only notes how it was called; $LOG and $TOKENS are set by the test.
echo "$*" >>"$LOG"
case "$*" in
*login*) cat >>"$TOKENS"; exit "${LOGIN_STATUS:-0}" ;;
*sha256*) md5sum | cut -c1-32 ;;
*"qflux.demo run"*) echo "the run's report: demo_run/runs/demo/v1/report.html"; exit "${DEMO_STATUS:-0}" ;;
*"-m pytest"*) exit "${PYTEST_STATUS:-0}" ;;
esac
"""


class Setup:
    """A copy of setup.sh in a folder of its own with a stub for the environment's Python."""

    def __init__(self, tmp_path: Path) -> None:
        self.checkout = tmp_path / "checkout"
        self.base = tmp_path / "base"
        self.log, self.tokens = tmp_path / "log", tmp_path / "tokens"
        (self.base / ".venv/bin").mkdir(parents=True)
        self.checkout.mkdir()
        for name in ("setup.sh", "pyproject.toml", "constraints.txt", "VERSION"):
            (self.checkout / name).write_bytes((ROOT / name).read_bytes())
        (self.base / ".venv/pyvenv.cfg").touch()
        self.python = self.base / ".venv/bin/python"
        self.python.write_text(STUB)
        self.python.chmod(0o755)

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return subprocess.run(
            ["bash", str(self.checkout / "setup.sh"), *words],
            cwd=self.base.parent,
            env={**os.environ, "LOG": str(self.log), "TOKENS": str(self.tokens), **env},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.mark.parametrize("words", [["--nope"], ["-x", "."], ["a", "b", "c"], ["hf_not_a_folder"]])
def test_a_wrong_call_is_one_line_and_exit_2(setup: Setup, words: list[str]) -> None:
    done = setup(*words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "hf_not" not in done.stderr
    assert not setup.log.read_text()


def test_a_folder_that_is_no_environment_is_left_alone(setup: Setup) -> None:
    (setup.base / ".venv/pyvenv.cfg").unlink()
    done = setup("base")
    assert done.returncode == 2
    assert "no Python environment" in done.stderr


def test_an_old_python_is_refused(setup: Setup, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "cat"):
        (tools / name).symlink_to(next(p for d in ("/bin", "/usr/bin") if (p := Path(d, name)).exists()))
    (tools / "python3").write_text("#!/bin/bash\nexit 1\n")
    (tools / "python3").chmod(0o755)
    done = setup("fresh", PATH=str(tools), PYTHON="")
    assert done.returncode == 2
    assert "no Python >= 3.11" in done.stderr


def test_second_run_installs_nothing(setup: Setup) -> None:
    assert setup("base").returncode == 0
    installs = [line for line in setup.log.read_text().splitlines() if "pip install" in line]
    assert installs[0].endswith(" torch==2.13.0")
    assert installs[1].endswith("-c constraints.txt -e .[dev,optimizers]")
    assert "up to date" in setup("base").stdout
    assert "pip install" not in setup.log.read_text()
    with (setup.checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    setup("base")
    assert "pip install" in setup.log.read_text()


@pytest.mark.parametrize("order", [["base", "hf_secret_1", "--test"], ["--test", "base", "hf_secret_1"]])
def test_the_token_goes_through_a_pipe_only(setup: Setup, order: list[str]) -> None:
    done = setup(*order)
    assert done.returncode == 0, done.stderr
    assert setup.tokens.read_text() == "hf_secret_1"
    everything = done.stdout + done.stderr + setup.log.read_text()
    everything += "".join(
        p.read_text() for folder in (setup.base, setup.checkout) for p in folder.rglob("*") if p.is_file()
    )
    assert "hf_secret_1" not in everything
    assert setup("base", "hf_secret_1", LOGIN_STATUS="1").returncode == 1


def test_the_demo_says_where_its_report_is(setup: Setup) -> None:
    done = setup("--demo", "base")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the run's report: demo_run/runs/demo/v1/report.html"
    calls = [line for line in setup.log.read_text().splitlines() if "qflux.demo" in line]
    assert calls == ["-m qflux.demo flux_kontext demo_run", "-m qflux.demo run demo_run"]
    assert setup("--demo", "base", DEMO_STATUS="3").returncode == 3


def test_failing_tests_fail_the_command(setup: Setup) -> None:
    assert setup("base", "--test", PYTEST_STATUS="1").returncode == 1
    assert "coverage report" not in setup.log.read_text()
    assert setup("base", "--test").returncode == 0
    assert "-m coverage report --fail-under=90" in setup.log.read_text()
