"""The house rules hold, and each rule catches a small offence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import house_rules as rules
import pytest

ROOT = Path(__file__).resolve().parents[2]
Rule = Callable[[str, str], list[str]]


def tracked() -> list[str]:
    """Files of the project, relative: git's and new ones that git does not ignore; without git all but hidden ones."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = done.stdout.splitlines()
    if done.returncode != 0:
        skip = ("__pycache__", "egg-info")
        found = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
        names = [name for name in found if name[0] != "." and not any(word in name for word in skip)]
    return sorted(name for name in names if (ROOT / name).is_file())


def texts(*prefixes: str, suffixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, str]]:
    for name in tracked():
        if name.startswith(prefixes or ("",)) and name.endswith(suffixes):
            try:
                yield name, (ROOT / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # not a text file


PYTHON = ("src/", "tests/", "scripts/", "bench/", "run_tests.py")


@pytest.mark.parametrize(
    "rule",
    [
        rules.import_direction,
        rules.parallel_only,
        rules.budgets,
        rules.family_names,
        rules.forbidden,
        rules.commented_code,
    ],
    ids=lambda rule: rule.__name__,
)
def test_python_files_keep_the_rule(rule: Rule) -> None:
    bad = [line for name, text in texts(*PYTHON, suffixes=(".py",)) for line in rule(name, text)]
    assert not bad, "\n" + "\n".join(bad)


def test_no_file_names_a_machine() -> None:
    bad = [line for name, text in texts() for line in rules.machine_paths(name, text)]
    assert not bad, "\n" + "\n".join(bad)


def test_the_project_speaks_of_itself() -> None:
    places = texts("src/", "docs/", "configs/", "README.md", "CONTRIBUTING.md", suffixes=(".py", ".md", ".yaml"))
    bad = [line for name, text in places for line in rules.own_words(name, text)]
    assert not bad, "\n" + "\n".join(bad)


def test_links_lead_to_files() -> None:
    bad = []
    for name, text in texts("README.md", "CONTRIBUTING.md", "docs/", "configs/", suffixes=(".md", ".yaml")):
        base = (ROOT / name).parent if name.endswith(".md") else ROOT
        bad += [f"{name}: {link}" for link in rules.links(name, text) if not (base / link).exists()]
    assert not bad, "\n" + "\n".join(bad)


def test_schemas_are_schemas() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for path in sorted((ROOT / "docs" / "schemas").glob("*.json")):
        schema = json.loads(path.read_text())
        jsonschema.validators.validator_for(schema).check_schema(schema)


IMPORT_ALL = """
import importlib, os, sys
heavy = ("torch", "diffusers", "transformers", "datasets", "accelerate", "peft", "bitsandbytes")
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith("socket.") else None)
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = [word for word in heavy if word in sys.modules]
    if loaded:
        sys.exit(f"import {name} loads {loaded}")
    if sockets:
        sys.exit(f"import {name} opens a socket: {sockets}")
    if dict(os.environ) != before:
        sys.exit(f"import {name} changes environment variables")
"""


def import_light(*modules: str, cwd: Path | None = None) -> str:
    """What the first offending import said, or an empty string."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    return done.stderr if done.returncode else ""


def test_importing_the_config_and_data_side_is_light() -> None:
    first = ["qflux", "qflux.types", "qflux.errors", "qflux.randomness", "qflux.config", "qflux.main"]
    data = [rules.module_of(name) for name, _ in texts("src/qflux/data/", suffixes=(".py",))]
    there = {rules.module_of(name) for name, _ in texts("src/", suffixes=(".py",))}
    assert not import_light(*[name for name in [*first, *data] if name in there])


def test_a_heavy_import_is_caught(tmp_path: Path) -> None:
    (tmp_path / "datasets.py").touch()
    (tmp_path / "heavy_one.py").write_text("import datasets")
    assert "loads ['datasets']" in import_light("heavy_one", cwd=tmp_path)
    (tmp_path / "caller.py").write_text("import socket\nsocket.socket()")
    assert "opens a socket" in import_light("caller", cwd=tmp_path)
    (tmp_path / "setter.py").write_text("import os\nos.environ['A_NEW_ONE'] = '1'")
    assert "changes environment" in import_light("setter", cwd=tmp_path)


def leaves(model: type, prefix: str = "") -> Iterator[str]:
    """Dotted paths of a pydantic model's leaf fields, through lists, dicts and unions."""
    from pydantic import BaseModel

    def models(annotation: object) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for part in typing.get_args(annotation):
            yield from models(part)

    for name, info in model.model_fields.items():  # type: ignore[attr-defined]
        inner = list(models(info.annotation))
        for nested in inner:
            yield from leaves(nested, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}"


def unread(model: type, sources: list[str]) -> list[str]:
    read = set().union(*map(rules.attributes_read, sources))
    return sorted({path for path in leaves(model) if path.rpartition(".")[2] not in read})


def test_every_config_field_is_read() -> None:
    needed = ("config.py", "main.py", "trainer/base_trainer.py")
    if not all((ROOT / "src/qflux" / name).exists() for name in needed):
        pytest.skip("the readers of the config are not all there")
    from qflux.config import Config

    skip = ("src/qflux/config", "src/qflux/migrate", "src/qflux/old_layout")
    sources = [text for name, text in texts("src/", suffixes=(".py",)) if not name.startswith(skip)]
    missing = unread(Config, sources)
    assert not missing


def test_an_unread_field_is_found() -> None:
    from pydantic import BaseModel

    class Inner(BaseModel):
        kept: int
        dropped: int

    class Outer(BaseModel):
        many: list[Inner] | None
        direct: dict[str, int]

    assert unread(Outer, ["a.kept", "getattr(b, 'direct')", "c.dropped = 1"]) == ["many.dropped"]


DEEP = "def f():\n if a:\n  for b in c:\n   with d:\n    while e:\n     try:\n      pass\n     finally:\n      pass\n"
LONG = "def f():\n" + " x = 1\n" * 60
OFFENCES: list[tuple[Rule, str, str, str]] = [
    (rules.import_direction, "src/qflux/data/a.py", "def f():\n    import qflux.models.b", "to its right"),
    (rules.import_direction, "src/qflux/loss/a.py", "from ..trainer import base_trainer", "to its right"),
    (rules.import_direction, "src/qflux/io/a.py", "from qflux import main", "to its right"),
    (rules.import_direction, "src/qflux/trainer/a_trainer.py", "import_module('qflux.demo')", "to its right"),
    (rules.import_direction, "src/qflux/trainer/a_trainer.py", "from .b_trainer import B", "another trainer"),
    (rules.import_direction, "src/qflux/nowhere.py", "", "no layer"),
    (rules.parallel_only, "src/qflux/models/a.py", "from accelerate.utils import x", "outside parallel"),
    (rules.parallel_only, "src/qflux/runtime/tracking.py", "import accelerate", "outside parallel"),
    (rules.budgets, "src/qflux/a.py", "\n" * 401, "401 lines"),
    (rules.budgets, "src/qflux/trainer/a_trainer.py", "\n" * 251, "251 lines"),
    (rules.budgets, "bench/a.py", LONG, "61 lines"),
    (rules.budgets, "tests/a.py", DEEP, "5 deep"),
    (rules.family_names, "src/qflux/models/a.py", "if name == 'flux': pass", "'flux'"),
    (rules.family_names, "src/qflux/trainer/base_trainer.py", "QwenImage()", "'Qwen'"),
    (rules.family_names, "src/qflux/models/a.py", "# as for FLUX.1", "'FLUX'"),
    (rules.forbidden, "src/qflux/a.py", "import pickle", "pickle"),
    (rules.forbidden, "src/qflux/a.py", "from torch import load", "pickle"),
    (rules.forbidden, "src/qflux/a.py", "torch.save(x, y)", "torch.save"),
    (rules.forbidden, "src/qflux/a.py", "yaml.load(x)", "Safe"),
    (rules.forbidden, "src/qflux/a.py", "eval('1')", "eval"),
    (rules.forbidden, "src/qflux/a.py", "exec('1')", "exec"),
    (rules.forbidden, "src/qflux/a.py", "map(eval, lines)", "eval"),
    (rules.forbidden, "src/qflux/a.py", "compile(text, 'a', 'single')", "compile"),
    (rules.forbidden, "src/qflux/a.py", "from os import system", "os.system"),
    (rules.forbidden, "src/qflux/a.py", "load(x, weights_only=flag)", "weights_only"),
    (rules.forbidden, "src/qflux/a.py", "ZipFile(x).extractall(y)", "extractall"),
    (rules.forbidden, "src/qflux/a.py", "importlib.import_module(config.name)", "imported by a name"),
    (rules.forbidden, "src/qflux/a.py", "__import__(name)", "imported by a name"),
    (rules.forbidden, "src/qflux/a.py", "run('ls', shell=True)", "shell"),
    (rules.forbidden, "src/qflux/a.py", "f(trust_remote_code=flag)", "trust_remote_code"),
    (rules.forbidden, "src/qflux/a.py", "try:\n    f()\nexcept Exception:\n    pass", "swallowed"),
    (rules.commented_code, "src/qflux/a.py", "# import os", "import os"),
    (rules.commented_code, "src/qflux/a.py", "x = 1  # self.call(x)", "self.call"),
    (rules.machine_paths, "README.md", "see /" + "home/me/x", "machine"),
    (rules.machine_paths, "setup.sh", "pip -i https://py" + "pi.org/simple", "machine"),
    (rules.own_words, "docs/a.md", "asked for by Issue #4", "Issue #4"),
    (rules.own_words, "src/qflux/a.py", "# written by an agent", "agent"),
]


@pytest.mark.parametrize(("rule", "path", "source", "word"), OFFENCES)
def test_each_rule_catches(rule: Rule, path: str, source: str, word: str) -> None:
    found = rule(path, source)
    assert len(found) == 1
    assert word in found[0]


FINE: list[tuple[Rule, str, str]] = [
    (rules.import_direction, "src/qflux/data/a.py", "import torch, qflux.io.atomic\nfrom qflux import __version__"),
    (rules.import_direction, "src/qflux/trainer/a_trainer.py", "from .base_trainer import BaseTrainer"),
    (rules.parallel_only, "src/qflux/runtime/tracking.py", "from accelerate.tracking import GeneralTracker"),
    (rules.parallel_only, "src/qflux/parallel/a.py", "import accelerate"),
    (rules.budgets, "src/qflux/a.py", LONG[:-7]),
    (rules.budgets, "src/qflux/a.py", "def f():\n if a: x\n elif b: x\n elif c: x\n elif d: x\n elif e: x\n"),
    (rules.family_names, "src/qflux/a.py", "import qflux, wandb\nWANDB = QfluxError  # want luminance"),
    (rules.family_names, "src/qflux/trainer/flux_trainer.py", "Flux"),
    (
        rules.forbidden,
        "src/qflux/a.py",
        "model.eval()\nre.compile(x)\nyaml.load(x, Loader=yaml.CSafeLoader)\nrun(['ls'], shell=False)",
    ),
    (rules.commented_code, "src/qflux/a.py", "# if the file is there: keep it\n# share = samples / all"),
    (rules.machine_paths, "README.md", "src/" + "work/x and https://a.b/c"),
    (rules.own_words, "docs/a.md", "professional, reagent, an issue of taste"),
]


@pytest.mark.parametrize(("rule", "path", "source"), FINE)
def test_no_rule_cries_wolf(rule: Rule, path: str, source: str) -> None:
    assert not rule(path, source)


def test_links_are_found() -> None:
    assert rules.links("README.md", "[a](docs/x.md#part) ![b](c.png) [w](https://a.b)") == ["docs/x.md", "c.png"]
    assert rules.links("configs/a.yaml", "x: 1  # see docs/guide/a.md.") == ["docs/guide/a.md"]


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join)
def test_lint_format_and_types(words: tuple[str, ...]) -> None:
    done = tool(*words)
    assert done.returncode == 0, "\n" + done.stdout + done.stderr
