"""What a comparison refuses before it draws: adapters of strangers, places that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qflux.config import Config, LoraConfig
from qflux.errors import UserError
from qflux.io.tensors import save_tensors
from qflux.models.adapters import METADATA_KEY
from qflux.tools import compare

GOOD = {"r": 3, "lora_alpha": 1.5, "target_modules": ["to_q", "to_k"]}


def config() -> Config:
    return Config.model_construct(model=Config.model_fields["model"].annotation.model_construct(lora=LoraConfig()))


def adapter(folder: Path, text: str | None) -> Path:
    path = folder / "lone.safetensors"
    save_tensors(path, {"x": torch.zeros(1)}, {} if text is None else {METADATA_KEY: text})
    return path


def told(settings: dict[str, Any]) -> str:
    return json.dumps({f"transformer.{key}": value for key, value in settings.items()})


def test_a_lone_adapter_brings_its_settings(tmp_path: Path) -> None:
    lora = compare._with_adapter(config(), adapter(tmp_path, told(GOOD))).model.lora
    assert (lora.r, lora.lora_alpha, lora.target_modules, lora.use_dora) == (3, 1.5, ("to_q", "to_k"), False)
    assert compare._with_adapter(config(), adapter(tmp_path, None)).model.lora == LoraConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot be read"),
        ("[1]", "no JSON object"),
        (told({"r": 3, "lora_alpha": 3}), "target_modules None, expected names"),
        (told(GOOD | {"target_modules": [1]}), "target_modules [1], expected names"),
        (told(GOOD | {"r": "8"}), "r '8', expected a whole number above 0"),
        (told(GOOD | {"r": True}), "r True, expected a whole number above 0"),
        (told(GOOD | {"lora_alpha": -1}), "lora_alpha -1, expected a number above 0"),
    ],
)
def test_a_strangers_metadata_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = adapter(tmp_path, text)
    with pytest.raises(UserError) as caught:
        compare._with_adapter(config(), path)
    (line,) = caught.value.problems
    assert str(path) in line
    assert expected in line


def test_places_are_tried_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(compare, "open_sides", lambda words: (compare.Side(words[0], config(), None),) * 2)
    monkeypatch.setattr(compare, "_entries", lambda *_: ())
    monkeypatch.setattr(compare, "_measure", lambda *words: drawn.append(words))
    (tmp_path / "afile").write_text("mine")
    locked = tmp_path / "locked"

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for words, expected in (
        (["--out", str(tmp_path / "afile" / "x")], "--out: found"),
        (["--out", str(tmp_path / "afile")], "--out: found"),
        (["--json", str(tmp_path / "afile" / "x.json")], "--json: found"),
        (["--json", str(tmp_path)], "a folder, expected a file"),
        (["--out", str(locked)], "Permission denied; name another place with --out or --json"),
    ):
        with monkeypatch.context() as patch:
            if str(locked) in words:
                patch.setattr(Path, "mkdir", refuse)
            assert compare.main(["a", "b", *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert expected in lines[0]
    assert not drawn
    assert (tmp_path / "afile").read_text() == "mine"
