"""README and docs tell the truth: commands parse, options and config keys exist, links resolve, configs load."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import house_rules as rules
import pytest
import yaml

from qflux.config import Config, config_schema, load_config
from qflux.io.quiet import quiet_imports
from qflux.main import parse, trainer_names

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = "model|data|train|logging|cache"
# Shown as examples of what is refused, and options of other programs.
REFUSED_KEYS = {"data.batch_sise", "data.init_args"}
FOREIGN_OPTIONS = {
    "--config_file", "--num_processes", "--machine_rank", "--main_process_ip", "--main_process_port",
    "--standalone", "--nproc_per_node", "--max-restarts", "--nnodes", "--rdzv_backend", "--rdzv_endpoint",
}  # fmt: skip
OPTION_SOURCES = ("src/qflux/**/*.py", "scripts/*", "bench/*.py", "run_tests.py", "setup.sh")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block, its indentation taken off."""
    pattern = r"^( *)```(\w*)\n(.*?)^\1```$"
    for indent, language, text in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL):
        yield language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def code(page: Path) -> list[str]:
    """Lines of the fenced blocks and the inline code."""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S))
    return [line for language, text in fences(page) if language != "python" for line in text.splitlines()] + inline


def commands(page: Path) -> list[list[str]]:
    """Words behind ``-m qflux.main`` of every command that is shown."""
    found = (line.partition("-m qflux.main")[2] for line in code(page) if "-m qflux.main " in line)
    return [shlex.split(words, comments=True) for words in found]


def known(key: str) -> bool:
    """Does a dotted key name a field of the config's schema?"""
    schema = config_schema()
    nodes: list[Any] = [schema]
    for name in key.split("."):
        opened = [leaf for node in nodes for leaf in _opened(node, schema)]
        nodes = [node["properties"][name] for node in opened if name in node.get("properties", {})]
    return bool(nodes)


def _opened(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema's node with references and alternatives followed."""
    yield node
    if "$ref" in node:
        yield from _opened(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    for choice in node.get("anyOf", ()):
        yield from _opened(choice, schema)


def keys(page: Path) -> set[str]:
    """Dotted config keys that a page names, in prose, tables and commands."""
    found = re.findall(rf"(?<![\w./])((?:{SECTIONS})(?:\.[a-z]\w*)+)(?![\w/])", page.read_text())
    return {key for key in found if not key.endswith((".md", ".py", ".yaml", ".jsonl")) and key not in REFUSED_KEYS}


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(base[key], extra[key]) for key in base.keys() & extra.keys() if isinstance(base[key], dict)}
    return base | extra | both


def test_the_readers_of_pages_read() -> None:
    assert len(commands(README)) >= 5
    assert {"train.max_train_steps", "train.guidance_scale"} <= keys(README)
    assert known("train.optimizer.lr")
    assert known("logging.validation.samples")
    assert not known("train.optimizer.rate")
    assert not known("train.lr")


@pages
def test_commands_parse_and_their_overrides_exist(page: Path) -> None:
    for words in commands(page):
        overrides = [word for word in parse(words).overrides if not word.startswith("key.path=")]
        assert not [word for word in overrides if not known(word.partition("=")[0])], words


@pages
def test_config_keys_exist(page: Path) -> None:
    assert not sorted(key for key in keys(page) if not known(key))


def test_options_exist() -> None:
    sources = [path.read_text() for pattern in OPTION_SOURCES for path in ROOT.glob(pattern) if path.is_file()]
    existing = {option for text in sources for option in re.findall(r"(?<![\w-])(--[a-z][\w-]*)[\"' )]", text)}
    named = {option for page in PAGES for line in code(page) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", line)}
    assert {"--resume", "--demo", "--compare"} <= named
    assert not named - existing - FOREIGN_OPTIONS


@pages
def test_links_resolve(page: Path) -> None:
    assert not [link for link in rules.links(page.name, page.read_text()) if not (page.parent / link).exists()]


def loaded(text: str, folder: Path) -> Config:
    """The config of a block; the pictures that it names are made first, and what a run needs besides is added."""
    base = {
        "model": {"pretrained_model_name_or_path": "owner/name"},
        "data": {"dataset_path": "pairs"},
        "train": {"trainer": "FluxKontext"},
    }
    for name in re.findall(r"[\w.]+\.(?:png|jpg)", text):
        (folder / name).touch()
    shown = yaml.safe_load(text) or {}
    (folder / "run.yaml").write_text(text if base.keys() <= shown.keys() else yaml.safe_dump(merged(base, shown)))
    return load_config(folder / "run.yaml")


@pages
def test_yaml_is_configuration(page: Path, tmp_path: Path) -> None:
    for language, text in fences(page):
        if language == "yaml":
            loaded(text, tmp_path)


def test_the_readmes_run_is_complete(tmp_path: Path) -> None:
    (text,) = (text for language, text in fences(README) if language == "yaml")
    config = loaded(text, tmp_path)
    assert config.train.trainer in trainer_names()
    folder = f"{config.logging.output_dir.name}/{config.logging.tracker_project_name}"
    last = f"{folder}/v1/checkpoint-{config.train.max_train_steps:06d}"
    assert last in README.read_text()
    assert config.train.max_train_steps % config.train.checkpointing_steps == 0
    assert f"guidance_scale={config.train.guidance_scale}," in README.read_text()


def test_the_readmes_python_calls_the_official_pipeline() -> None:
    (text,) = (text for language, text in fences(README) if language == "python")
    (call,) = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe"
    )
    with quiet_imports():
        from diffusers import FluxKontextPipeline
    words = inspect.signature(FluxKontextPipeline.__call__).parameters
    assert not [keyword.arg for keyword in call.keywords if keyword.arg not in words]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
