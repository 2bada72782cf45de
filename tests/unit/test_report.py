from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from qflux.runtime.charts import Line, line_chart, nice_ticks, smoothed, thin
from qflux.runtime.report import write_report


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "demo" / "v3"
    folder.mkdir(parents=True)
    record = {
        "trainer": "Some",
        "max_train_steps": 100,
        "exit_code": 0,
        "reason": "done",
        "step": 100,
        "seed": 7,
        "device": "cpu",
        "versions": {"torch": "2.0"},
        "notes": ["sizes <b>come</b> from the config"],
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(
        "train: {lr: 0.1, trainer: Some}\ndata: {prompt: '<script>alert(1)</script>'}\n"
    )
    lines = [{"step": 0, "val_loss": 1.0, "val_loss_sigma": {"0-0.5": 0.5, "0.5-1": None}}]
    for step in range(1, 101):
        loss = None if step == 50 else 1 / step + 0.05 * (step % 3)
        line = {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-4, "samples_per_second": 3.5, "skipped": 1}
        lines.append(line)
    lines.append({"step": 100, "val_loss": 0.25, "val_loss_sigma": {"0-0.5": 0.125, "0.5-1": 0.375}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def samples(run: Path, step: int, scores: dict[str, float] | None = None) -> Path:
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(folder / "sheet.png")
    if scores is not None:
        for name in scores:
            Image.new("RGB", (8, 8), "blue").save(folder / f"{name}.png")
        rows = [{"name": name, "score": score, "metric": "PSNR"} for name, score in scores.items()]
        (folder / "scores.json").write_text(json.dumps(rows))
    return folder


class Checker(HTMLParser):
    """Every tag is closed in order, nothing is loaded from anywhere."""

    void = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        for name in ("src", "href"):
            assert values.get(name, "data:").startswith("data:")
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(run: Path) -> str:
    text = write_report(run).read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert not {"script", "link", "iframe"} & set(checker.tags)
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    return text


def test_a_finished_run_in_one_self_contained_file(run):
    samples(run, 0)
    samples(run, 100, {f"s{i}": float(i) for i in range(8)})
    text = page_of(run)
    assert "demo v3" in text
    assert "100 of 100" in text
    for title in ("Training loss", "Held-out loss", "Learning rate", "Gradient norm", "Samples per second"):
        assert f'aria-label="{title}"' in text
    best, worst = text.split("<p>Best</p>")[1].split("<h2>Samples")[0].split("<p>Worst</p>")
    assert re.findall(r"<figcaption>(s\d)", best) == ["s7", "s6", "s5"]
    assert re.findall(r"<figcaption>(s\d)", worst) == ["s0", "s1", "s2"]
    assert text.index("step-000100</figcaption>") < text.index("step-000000</figcaption>")
    assert text.count("<img") == 2 + 6
    assert "train.lr" in text
    assert "&lt;script&gt;" in text
    assert "sizes &lt;b&gt;" in text
    assert "0.375" in text
    assert "http" not in text
    assert write_report(run).read_text() == text


def test_every_logged_step_that_was_skipped_is_counted(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["skipped"] = int(line["step"] in (7, 30, 31)) if "loss" in line else None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "<b>3 of 100</b><span>logged steps skipped: not finite</span>" in page_of(run)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"skipped": 0}) + "\n" for line in lines))
    assert "not finite" not in page_of(run)


def test_in_the_middle_of_a_run_and_after_a_crash(run):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "exit_code": None, "reason": None, "step": 0}))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "lo')
    folder = samples(run, 100)
    (folder / "sheet.png").write_bytes(b"not a picture")
    (folder / "scores.json").write_text('[{"na')
    text = page_of(run)
    assert "running, or ended without a word" in text
    assert "100 of 100" in text
    assert "sheet.png cannot be read" in text


@pytest.mark.parametrize("left", [(), ("run.json",), ("metrics.jsonl",)])
def test_a_folder_with_little_in_it(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{}")
    assert "<h1>" in page_of(tmp_path)


def test_few_scores_are_not_named_twice_and_names_stay_inside(run):
    samples(run, 100, {"a": 1.0, "b": 2.0})
    scores = run / "samples" / "step-000100" / "scores.json"
    outside = {"name": "../../../secret", "score": 0.5, "metric": "PSNR"}
    scores.write_text(json.dumps([*json.loads(scores.read_text()), outside, {"name": "n", "score": None}]))
    (run.parent / "secret.png").write_bytes((run / "samples" / "step-000100" / "a.png").read_bytes())
    text = page_of(run)
    assert "<p>Worst</p>" not in text
    assert text.count("<img") == 1 + 2


def test_large_pictures_are_scaled_and_many_validations_thinned(run):
    for step in range(20):
        samples(run, step)
    Image.effect_noise((3000, 600), 80).save(run / "samples" / "step-000019" / "sheet.png")
    text = page_of(run)
    assert text.count("<img") == 12
    assert "12 of 20 validations" in text
    assert "step-000019</figcaption>" in text
    assert "step-000000</figcaption>" in text
    assert "data:image/jpeg" in text


def test_smoothing_keeps_a_constant_and_starts_without_bias():
    assert [y for _, y in smoothed([(i, 2.0) for i in range(100)])] == pytest.approx([2.0] * 100)
    points = [(0, 4.0), (1, 0.0)]
    assert smoothed(points)[0] == (0, 4.0)
    assert 0 < smoothed(points)[1][1] < 2.0


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3e-5, 1e-4), (5.0, 5.0), (0.0, 0.0), (-2.0, 1e6), (0.1, 0.30001)]
)
def test_ticks_surround_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 8


def test_thinning_keeps_peaks():
    points = [(float(i), 100.0 if i == 7777 else (i % 5) * 1.0) for i in range(20000)]
    kept = thin(points)
    assert len(kept) <= 700
    assert (7777.0, 100.0) in kept
    assert kept == sorted(kept)


def test_a_chart_of_nothing_is_nothing_and_one_point_is_a_dot():
    assert line_chart("x", [Line("a", []), Line("b", [(1, float("nan"))])]) == ""
    assert "<circle" in line_chart("x", [Line("a", [(1, 2.0)])])


def test_an_outlier_of_the_faint_curve_does_not_squash_the_other():
    noisy = [(i, 1000.0 if i == 30 else 1.0) for i in range(100)]
    assert "1,000" not in line_chart("x", [Line("raw", noisy, "faint"), Line("smooth", [(i, 1.0) for i in range(100)])])
