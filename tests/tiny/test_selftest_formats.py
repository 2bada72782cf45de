"""run_tests.py: every number format against bf16, and what makes a row fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_project import ROOT

from qflux.config_values import METHODS
from qflux.demo.shapes import write_pairs
from qflux.demo.tiny_models import build_flux_kontext_random
from qflux.errors import UserError
from qflux.models import memory_rules
from qflux.models.memory_rules import ADVICE
from qflux.models.quantized_layers import PackedLinear
from qflux.tools import selftest_formats as formats
from qflux.trainer.flux_kontext_trainer import FluxKontextTrainer

TRAINERS = {"FluxKontext": FluxKontextTrainer}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, four pairs and a config."""
    folder = tmp_path_factory.mktemp("formats")
    build_flux_kontext_random(folder / "model", seed=1)
    write_pairs(folder / "data", 4, seed=0)
    (folder / "config.yaml").write_text(
        "model: {pretrained_model_name_or_path: ./model}\ndata: {dataset_path: data, target_size: [64, 64]}\n"
        "train: {trainer: FluxKontext}\ncache: {cache_dir: cache}\n"
    )
    return folder / "config.yaml"


def opened(config_file: Path, method: str | None = None) -> Any:
    return formats.open_trainer(FluxKontextTrainer, config_file, CPU, method)


def rows(config_file: Path, *only: str, marked: tuple[str, ...] = ()) -> dict[str, formats.FormatResult]:
    found = formats.run_formats(TRAINERS, only, lambda *_: config_file, marked)
    return {row.format: row for row in found}


@pytest.fixture(scope="module")
def plain(config_file: Path) -> formats.Measured:
    trainer = opened(config_file)
    return formats.measured(trainer, formats.read_batches(trainer), METHODS)


def test_every_format_has_a_row_that_passes(
    script: ModuleType, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = formats.run_formats
    monkeypatch.setattr(  # random weights have no marks
        formats, "run_formats", lambda trainers, only, make, marked, device: run(trainers, only, make, (), device)
    )
    assert script.main(["--config", str(config_file), "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    schema = json.loads((ROOT / "docs" / "schemas" / "run_tests.schema.json").read_text())
    pytest.importorskip("jsonschema").validate(found, schema)
    assert found["passed"]
    assert found["results"] == []
    plain, *others = found["formats"]
    assert [plain["format"], *(row["format"] for row in others)] == [formats.PLAIN, *METHODS]
    assert {row["format"]: row["note"] for row in others if row["note"]} == ADVICE
    bits = {row["format"]: row["bytes"] for row in others}
    assert bits["quanto-int2"] < bits["quanto-int4"] < bits["quanto-int8"] < plain["bytes"]
    errors = {row["format"]: row["velocity"] for row in others}
    assert 0 < errors["bnb-int8"] < errors["quanto-fp8"] < errors["quanto-int4"] < errors["quanto-int2"]
    cosines = {row["format"]: row["cosine"] for row in others}
    assert cosines["quanto-int2"] < cosines["quanto-int4"] < cosines["quanto-int8"] < 1
    printed = capsys.readouterr().out
    assert printed.count("ok\n") == len(found["formats"])
    assert f"quanto-int2: {ADVICE['quanto-int2']}" in printed


def test_both_sides_get_the_same(config_file: Path, plain: formats.Measured) -> None:
    trainer = opened(config_file)
    again = formats.measured(trainer, formats.read_batches(trainer))
    assert torch.equal(again.velocity, plain.velocity)
    assert torch.equal(again.gradient, plain.gradient)
    row = formats.judge("x", "bnb-int8", plain, replace(again, layout=plain.expected["bnb-int8"]), marked=True)
    assert (row.layer, row.velocity, row.cosine, row.passed) == (0, 0, pytest.approx(1), True)


def test_the_gradient_reaches_both_factors(config_file: Path) -> None:
    """With B = 0, as a run begins, the gradient of A would be zero, and half the adapter would not be compared."""
    trainer = opened(config_file)
    model = trainer.load(trainer.family.denoiser)
    formats._prepare(trainer, model)
    formats.gradient(trainer, model, formats.read_batches(trainer)[:1])
    for name, parameter in formats.adapters.trainable(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_base_that_stayed_in_bf16_fails(
    script: ModuleType, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(memory_rules, "method_of", lambda *_: None)
    assert script.main(["--config", str(config_file), "--test", "format-bnb-nf4"]) == 1
    printed = capsys.readouterr().out
    assert "is in bf16, not uint8 of" in printed
    assert "FAILED" in printed


def test_layers_stored_otherwise_are_named() -> None:
    wanted: formats.Layout = {"a": (torch.uint8, 10), "b": (torch.int8, 20)}
    assert formats.layout_problems(dict(wanted), wanted) == []
    (line,) = formats.layout_problems({"a": (torch.uint8, 10), "b": (torch.int8, 21), "c": (torch.int8, 1)}, wanted)
    assert "b is int8 of 21 bytes, not int8 of 20 bytes" in line
    assert "c is int8 of 1 bytes, not in bf16" in line
    (line,) = formats.layout_problems({"a": (torch.int8, 10), "b": (torch.int8, 20)}, wanted)
    assert line.startswith("1 of 2 layers")


def test_a_layer_that_computes_with_another_weight_fails(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PackedLinear.dequantize
    monkeypatch.setattr(PackedLinear, "dequantize", lambda layer, dtype: original(layer, dtype) * 1.1)
    row = rows(config_file, "format-quanto-int8")["quanto-int8"]
    assert row.layer == pytest.approx(0.1, rel=0.1)
    assert [problem for problem in row.problems if problem.startswith("the output of ")]


@pytest.mark.parametrize(("angle", "marked", "failed"), [(0.01, True, 0), (0.019, True, 0), (0.021, True, 1),
                                                         (0.15, True, 2), (0.15, False, 0)])  # fmt: skip
def test_bounds_are_bounds(plain: formats.Measured, angle: float, marked: bool, failed: int) -> None:
    """Velocity and gradient turned by an angle: the error is its chord, the cosine its cosine."""

    def turned(vector: torch.Tensor) -> torch.Tensor:
        across = torch.randn(vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vector = vector.double()
        across -= vector * (across @ vector) / (vector @ vector)
        across *= vector.norm() / across.norm()
        turn = torch.tensor(angle, dtype=torch.float64)
        return vector * turn.cos() + across * turn.sin()

    found = replace(
        plain, velocity=turned(plain.velocity), gradient=turned(plain.gradient), layout=plain.expected["quanto-int8"]
    )
    row = formats.judge("x", "quanto-int8", plain, found, marked)
    assert row.velocity == pytest.approx(angle, rel=1e-2)
    assert len(row.problems) == failed


def test_what_is_not_finite_fails(plain: formats.Measured) -> None:
    broken = replace(plain, velocity=plain.velocity * torch.nan, layout=plain.expected["quanto-int2"])
    row = formats.judge("x", "quanto-int2", plain, broken, marked=False)
    assert not row.passed
    assert formats.as_json([row])[0]["velocity"] is None


def test_a_format_that_breaks_is_a_failed_row(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(formats.quant, "quantized", broken)
    found = rows(config_file, "format-bnb-fp4")
    assert found["bf16"].passed
    assert found["bnb-fp4"].problems == ("RuntimeError: no kernel today",)
    assert "–" in formats.table(list(found.values()))


def test_a_base_that_does_not_load_is_a_failed_row() -> None:
    def broken(name: str, folder: Path) -> Path:
        raise RuntimeError("no model today")

    (row,) = formats.run_formats(TRAINERS, (), broken)
    assert (row.format, row.problems) == (formats.PLAIN, ("RuntimeError: no model today",))


def test_rows_are_chosen_by_name(config_file: Path) -> None:
    assert rows(config_file, "cached-loss") == {}
    assert rows(config_file, "Other/format-bnb-nf4") == {}
    assert list(rows(config_file, "FluxKontext/format-bnb-int8")) == ["bf16", "bnb-int8"]


def test_a_config_without_an_adapter_gets_one(config_file: Path) -> None:
    full = config_file.with_name("full.yaml")
    full.write_text(config_file.read_text().replace("./model}", "./model, lora: null}"))
    config = formats.config_on(full, "bnb-nf4")
    assert (config.model.lora is not None, config.model.quantize, config.train.mixed_precision) == (
        True, "bnb-nf4", "bf16",
    )  # fmt: skip


def test_a_config_that_cannot_be_compared_is_one_line(
    script: ModuleType, config_file: Path, tmp_path: Path, capsys: Any
) -> None:
    assert formats.check_config(FluxKontextTrainer, config_file) == config_file.parent / "model"
    moved = tmp_path / "run.yaml"
    moved.write_text(config_file.read_text().replace("./model", str(config_file.parent / "model")))
    with pytest.raises(UserError, match=r"data\.dataset_path"):
        formats.check_config(FluxKontextTrainer, moved)
    assert script.main(["--config", str(moved)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--config", str(config_file), "--compare", "a", "b"])


def test_a_model_that_is_quantized_already_is_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_rules, "stored_format", lambda config: "bnb-nf4" if "num_layers" in config else None)
    with pytest.raises(UserError, match="is quantized already"):
        formats.check_config(FluxKontextTrainer, config_file)
