"""Tokens and passwords: told apart from other text, taken out of what is said.

They come from the environment or a login store, never from a config or a command line; so text that holds one is
refused there, and whatever is printed passes ``redact``. Known are the usual forms of tokens, the user part of an
address, words behind a name such as ``token=``, and the values of environment variables that are named like secrets.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

HIDDEN = "***"
ADVICE = "remove it; tokens and passwords come from the environment (HF_TOKEN) or a login (`hf auth login`)"
_SHORTEST, _SURE = 8, 16  # a shorter value of a variable, or one of letters or digits alone, may be any word
_NAME = r"(?:token|api[_-]?key|access[_-]?key|secret(?:[_-]?key)?|passw(?:or)?d|passphrase)"
_VARIABLE = re.compile(rf".*{_NAME}|.+_(?:key|pat|pwd)", re.IGNORECASE)
# Names of data sets and adapters begin with sk- too: keys have a long run without dashes, of letters and digits.
_RUN = r"(?=[A-Za-z0-9]*\d)(?=[A-Za-z0-9]*[A-Z])[A-Za-z0-9]{20,}"
_DASHED = r"(?=[\w-]{0,200}\d)(?=[\w-]{0,200}[A-Z])[\w-]{40,}"
_PLAIN = rf"(?:{_RUN}|[0-9a-f]{{32,}})"
_SK = rf"sk-(?:(?:proj-|svcacct-|admin-|ant-[a-z0-9]+-|or-v1-)(?:{_DASHED}|{_PLAIN})|{_PLAIN})"
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    r"|wandb_v1_\w{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,})\b"
    rf"|\b{_SK}(?![A-Za-z0-9])"
)
# A path that was made of an address has lost a slash; a drive's letter is no scheme.
_ADDRESS = re.compile(r"(?P<front>\b[A-Za-z][A-Za-z0-9+.-]{1,40}:/{1,3})(?P<user>[^\s/'\"<>]*)@")
_QUERY = re.compile(rf"[?&][\w-]{{0,40}}{_NAME}=", re.IGNORECASE)
_VALUE = r"[^\s&;,'\"]"
_NAMED = re.compile(
    rf"(?P<front>[?&][\w-]{{0,40}}{_NAME}=|--[\w-]{{0,40}}{_NAME}[= ]['\"]?){_VALUE}+"
    rf"|(?P<bare>(?:\b|_){_NAME}=)(?!-?[\d.]+(?!{_VALUE})){_VALUE}{{{_SHORTEST},}}",  # max_token=512 is a setting
    re.IGNORECASE,
)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret: ``hf_token``, ``WANDB_API_KEY``."""
    return _VARIABLE.fullmatch(name) is not None


def secret_in(text: str) -> str | None:
    """What secret a text from a config or a command line holds, in words without it; None for none."""
    if len(text) < _SHORTEST:
        return None
    if _TOKEN.search(text):
        return "looks like an access token"
    if any(":" in found["user"] for found in _ADDRESS.finditer(text)):
        return "is an address with a password"
    if _QUERY.search(text):
        return "is an address with a token"
    names = [name for name, value in _variables() if value in text]
    return f"holds the value of the environment variable {names[0]}" if names else None


def redact(text: str) -> str:
    """The text with every secret that can be told replaced by ``***``."""
    for _, value in _variables():
        text = text.replace(value, HIDDEN)
    text = _TOKEN.sub(HIDDEN, text)
    text = _ADDRESS.sub(rf"\g<front>{HIDDEN}@", text)
    return _NAMED.sub(lambda found: f"{found['front'] or found['bare']}{HIDDEN}", text)


def _variables() -> Iterator[tuple[str, str]]:
    """Name and value of variables that hold a secret, not the path of a file with it; of an address its password."""
    for name, value in os.environ.items():
        if "@" in value and (found := _ADDRESS.search(value)):
            value = found["user"].partition(":")[2]
        elif not is_secret_name(name):
            continue
        plain = value.isalpha() or value.isdigit()
        if len(value) >= (_SURE if plain else _SHORTEST) and not (os.path.isabs(value) and os.path.exists(value)):
            yield name, value


class _Redacting:
    """Stands for a text stream: what is written passes ``redact``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of the stream."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As of the stream."""
        for line in lines:
            self.write(line)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)


@contextmanager
def redacted_output() -> Iterator[None]:
    """While inside, no secret reaches stdout or stderr by Python's streams: lines, warnings, logs, tracebacks."""
    shown = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Redacting(stream) for stream in shown)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = shown
