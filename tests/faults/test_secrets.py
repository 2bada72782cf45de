"""Secrets are planted wherever people put them; a whole run, a crash and a push write and print none of their bytes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tiny_project import Outcome, Project, on_call, record

from qflux.config import load_config
from qflux.errors import RunStopped, UserError
from qflux.io import secrets
from qflux.io.secrets import HIDDEN, redact, secret_in
from qflux.runtime import report, run_folder
from qflux.trainer import loop

TOKEN = "hf_" + "Qa7" * 11
OLD_TOKEN = "hf_" + "Wb8" * 11
TRACKER = "5f2e" * 10
PROXY, PROXY_FILE = "pr0xy-passw0rd", "no-scheme-pr0xy"
DOTENV = "sk-" + "Ec9" * 12
STORED = "hf_" + "Rd1" * 11
ADDRESS = "https://somebody:addr3ss-passw0rd@host.example/some/where"
PASSWORD = "addr3ss-passw0rd"
GIVEN = "hf_" + "Tf2" * 11
WRITTEN = "wr1tten-in-the-config"
SECRETS = (TOKEN, OLD_TOKEN, TRACKER, PROXY, PROXY_FILE, DOTENV, STORED, PASSWORD, GIVEN, WRITTEN)
REPO = "me/red-paint"
ALL = f"a bug that tells all: {TOKEN} {TRACKER} {ADDRESS} http://user:{PROXY}@proxy token={OLD_TOKEN} {STORED} {GIVEN}"


def holding(name: str, content: bytes) -> list[str]:
    """``name: secret`` of each secret in some bytes."""
    return [f"{name}: {secret}" for secret in SECRETS if secret.encode() in content]


class Hub:
    """The hub in memory: the words of its calls and the files that it got."""

    def __init__(self) -> None:
        self.calls, self.fails = "", False
        self.files: dict[str, bytes] = {}

    def create_repo(self, *words: Any, **options: Any) -> None:
        """Note the call."""
        self.calls += f"{words} {options}\n"
        if self.fails:
            raise OSError(f"the proxy http://user:{PROXY}@proxy refused Bearer {TOKEN}")

    def upload_folder(self, **options: Any) -> None:
        """Take every file that the patterns name."""
        self.calls += f"{options}\n"
        folder = Path(options["folder_path"])
        self.files = {name: (folder / name).read_bytes() for name in options["allow_patterns"]}


class Searched:
    """A project with secrets all around it; every word that its runs print is kept."""

    def __init__(self, project: Project) -> None:
        self.project, self.said = project, ""
        self.env = project.root / ".env"
        self.env.write_text(f"HF_TOKEN={STORED}\nOPENAI_API_KEY={DOTENV}\n")
        held = {"logging.report_to": "tensorboard", "cache.cache_dir": str(project.root / "cache")}
        project.write({**held, "train.checkpointing_steps": 1})

    def run(self, *words: object, code: int = 0) -> Outcome:
        """A run that must end with ``code``."""
        done = self.project.run(*words)
        self.said += done.out + done.err
        assert done.code == code, done.out + done.err
        return done

    def found(self, *more: tuple[str, bytes]) -> list[str]:
        """Where a secret is: in files of the project (their names too), in what was printed, in what else is given."""
        files = [path for path in self.project.root.rglob("*") if path.is_file() and path != self.env]
        places = [(str(path), str(path).encode() + path.read_bytes()) for path in files]
        places += [("printed", self.said.encode()), *more]
        return [place for name, content in places for place in holding(name, content)]


@pytest.fixture
def searched(project: Project, monkeypatch: pytest.MonkeyPatch) -> Searched:
    """Secrets in the environment, in a file beside the config and in the login store."""
    for name, value in {
        "HF_TOKEN": TOKEN,
        "HUGGING_FACE_HUB_TOKEN": OLD_TOKEN,
        "WANDB_API_KEY": TRACKER,
        "https_proxy": f"http://user:{PROXY}@127.0.0.1:9",
        "FTP_PROXY": f"ftp://user:{PROXY_FILE}@127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    store = project.root.parent / f"{project.root.name}-store"
    store.write_text(STORED)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(store))
    return Searched(project)


def tell_all(error: Callable[[str], Exception] = RuntimeError) -> None:
    """A failure whose text holds every secret."""
    raise error(ALL)


def test_no_run_writes_or_prints_a_secret(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    project, hub = searched.project, Hub()
    drawn = project.validating(2, num_inference_steps=1)
    searched.run("--check")
    searched.run("--plan")
    searched.run("--cache", *drawn)
    for error, code in ((RuntimeError, 1), (RunStopped, 3)):
        with monkeypatch.context() as patched:
            on_call(patched, loop, "optimizer_step", 2, lambda error=error: tell_all(error))
            done = searched.run(*drawn, "--resume", "auto", "train.max_train_steps=3", code=code)
        assert ("Traceback" in done.err) == (code == 1)
        assert f"a bug that tells all: {HIDDEN} {HIDDEN} https://{HIDDEN}@host.example/some/where" in done.err
    assert record(project.newest())["reason"].startswith(f"a bug that tells all: {HIDDEN}")
    searched.run(*drawn, "--resume", "auto", "train.max_train_steps=3")
    run = project.newest()
    searched.run("--sample", "--checkpoint", run, *drawn)
    for fmt in ("kohya", "comfyui"):
        searched.run("--export", fmt, "--adapter", run / "checkpoint-000003")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    hub.fails = True
    assert f"http://{HIDDEN}@proxy refused Bearer {HIDDEN}" in searched.run("--push", REPO, code=2).err
    hub.fails = False
    searched.run("--push", REPO)
    assert {"README.md", "training_config.yaml"} < hub.files.keys()
    pushed = [(name, content) for name, content in hub.files.items()]
    assert searched.found(("calls of the hub", hub.calls.encode()), *pushed) == []
    written = {path.name.partition(".")[0] for path in run.rglob("*") if path.is_file()}
    assert {"events", "run", "config", "metrics", "report", "pytorch_lora_weights", "manifest", "README"} <= written


WORDS: dict[str, list[str]] = {
    "model": [f"model.pretrained_model_name_or_path={ADDRESS}"],
    "data": [f"data.dataset_path={ADDRESS}"],
    "hub data": [f"data.dataset_path={{repo_id: '{ADDRESS}', split: train}}"],
    "control": [f"logging.validation.samples=[{{prompt: x, controls: ['{ADDRESS}']}}]"],
    "prompt": [f"logging.validation.samples=[{{prompt: 'log in with {GIVEN}'}}]"],
    "folder": [f"logging.output_dir={ADDRESS}"],
    "tracker's name": [f"logging.tracker_project_name={TRACKER}"],
    "tracker": [f"logging.report_to={ADDRESS}"],
    "revision": [f"model.revision={GIVEN}"],
    "trigger": [f"data.trigger_word=x{OLD_TOKEN}"],
    "query": ["model.revision=https://host.example/?access_token=wr1tten-in-the-config"],
    "unknown key": [f"model.hf_token={WRITTEN}"],
    "unknown section": [f"wandb.api_key={WRITTEN}"],
    "key": [f"model.{GIVEN}=1"],
    "option": ["--hf_token", WRITTEN],
    "option with =": [f"--hf_token={WRITTEN}"],
    "no override": [GIVEN],
    "repository": ["--push", ADDRESS],
    "place": ["--check", "--out", ADDRESS],
    "checkpoint": ["--sample", "--checkpoint", f"/runs/{GIVEN}"],
    "resume": ["--resume", ADDRESS],
}


UNADVISED = ("option", "option with =", "no override", "unknown section", "key")  # unknown words whatever they hold


def ended(searched: Searched, words: list[str]) -> Outcome:
    """A refused run; argparse leaves by SystemExit."""
    try:
        return searched.run(*words, code=2)
    except SystemExit as end:
        out, err = searched.project.captured.readouterr()
        searched.said += out + err
        return Outcome(int(end.code or 0), out, err)


@pytest.mark.parametrize("name", WORDS)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(searched: Searched, name: str) -> None:
    done = ended(searched, WORDS[name])
    assert done.code == 2
    assert done.err
    assert "Traceback" not in done.err
    assert name in UNADVISED or "hf auth login" in done.err, done.err
    assert searched.found() == []
    assert {path.name for path in searched.project.root.iterdir()} == {".env", "run.yaml"}


LINES = (
    *(f"hf_token: {WRITTEN}", f"wandb_api_key: {TRACKER}", f"revision: '{ADDRESS}'", f"revision: {GIVEN}"),
    *(f'revision: "hf\\x5f{GIVEN[3:]}"', f"{GIVEN}: 1", f"{GIVEN}: [", f"password: !x {WRITTEN}"),
)


@pytest.mark.parametrize("line", LINES)
def test_a_secret_in_a_config_is_refused_and_not_repeated(searched: Searched, line: str) -> None:
    config = searched.project.config
    config.write_text(config.read_text().replace("model:\n", f"model:\n  {line}\n"))
    done = searched.run("--check", code=2)
    assert holding("printed", searched.said.encode()) == []
    assert "run.yaml:" in done.err
    assert "!x" in line or "[" in line or "hf auth login" in done.err


def test_the_search_sees_what_is_not_taken_out(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (secrets, run_folder, report):
        monkeypatch.setattr(module, "redact", lambda text: text)
    on_call(monkeypatch, loop, "optimizer_step", 2, lambda: tell_all(RunStopped))
    searched.run("train.max_train_steps=2", code=3)
    places = {Path(place.partition(": ")[0]).name for place in searched.found()}
    assert places == {"printed", "run.json", "report.html"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"x {GIVEN}, y", f"x {HIDDEN}, y"),
        (f"found '{ADDRESS}'", f"found 'https://{HIDDEN}@host.example/some/where'"),
        ("no folder a/https:/me:p@ss@host/y", f"no folder a/https:/{HIDDEN}@host/y"),
        ("GET /?a=1&access_token=abc&b=2", f"GET /?a=1&access_token={HIDDEN}&b=2"),
        ("unrecognized arguments: --my-api-key abc", f"unrecognized arguments: --my-api-key {HIDDEN}"),
        ("ghp_" + "a" * 36, HIDDEN),
    ],
)
def test_what_is_taken_out(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["step 3: loss 0.1, 4 tokens", "run.yaml:12: data.dataset_path: no such file: '/data/a@b'", "C:/me@home/x",
     "https://huggingface.co/me/x", "git@host:me/x", "hf_transfer", "0123456789abcdef" * 2, "<|token|>",
     "text token 5 of 7", "black-forest-labs/FLUX.1-Kontext-dev"],
)  # fmt: skip
def test_what_is_left_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "step")
    monkeypatch.setenv("WORD_TOKEN", "dataset")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "huggingface.co")
    assert redact(text) == text
    assert secret_in(text) is None


def test_nothing_is_read_from_a_file_beside_the_config(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    searched.run("--check")
    assert "HF_TOKEN" not in os.environ
    with pytest.raises(UserError, match="holds the value of the environment variable WANDB_API_KEY"):
        load_config(searched.project.config, [f"data.trigger_word={TRACKER}"])
    assert json.dumps(load_config(searched.project.config).model_dump(mode="json")).count(HIDDEN) == 0


@pytest.mark.parametrize(
    "text",
    [
        "sk-vogue-fashion-pictures/train",
        "owner/sk-anime-characters-lora-v2",
        "sk-learn-dataset-of-cats-2024",
        "owner/sk-proj-Anime2-characters-lora",
        "max_token=512",
        "num_token=77",
        "data.tokens: max_token=1000000000",
        "a sign that says password=yes",
    ],
)
def test_names_and_numbers_are_no_secrets(text: str) -> None:
    assert redact(text) == text
    assert secret_in(text) is None


@pytest.mark.parametrize(
    "token",
    [
        "sk-" + "Ec9" * 12,
        "sk-" + "4f0e" * 8,
        "sk-proj-" + "aB3_" * 10 + "T3-" + "x9Y" * 12,
        "sk-ant-api03-" + "aB3-" * 20,
        "sk-or-v1-" + "0a9f" * 16,
    ],
)
def test_true_keys_are_secrets(token: str) -> None:
    assert redact(f"with {token} in it") == f"with {HIDDEN} in it"
    assert secret_in(token) == "looks like an access token"


@pytest.mark.parametrize("name", ["PGPASSWORD", "MYSQL_PWD", "GITHUB_PAT", "WANDB_KEY", "HFTOKEN", "aws_secret_key"])
def test_variables_named_like_secrets_are_known(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "qwerty12345")
    assert redact("it is qwerty12345") == f"it is {HIDDEN}"
    assert secret_in("it is qwerty12345") == f"holds the value of the environment variable {name}"


def test_values_that_are_paths_or_numbers_are_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"TOKEN": str(tmp_path), "API_KEY": "00000064", "PWD": "/not/there/any/more"}.items():
        monkeypatch.setenv(name, value)
        assert redact(f"{value}/data") == f"{value}/data", name
        assert secret_in(f"{value}/data") is None
    monkeypatch.setenv("TOKEN", "/Qa8Zk2Lm9Rt")
    assert redact("/Qa8Zk2Lm9Rt") == HIDDEN


@pytest.mark.parametrize("word", ["sk-proj-", "a-", "token=", "sk-ant-a-", "?a", "--token"])
def test_a_long_text_takes_no_long_time(word: str) -> None:
    text, began = word * (400_000 // len(word)), time.monotonic()
    secret_in(text)
    redact(text)
    assert time.monotonic() - began < 5
