"""``report.html`` of a run folder: one file that opens anywhere, without network or script.

It is made from run.json, config.yaml, metrics.jsonl and samples/ alone, so it can be written in the middle of a run and
after a crash; what is missing or damaged is left out.
"""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qflux.data.sheet import evenly
from qflux.io import atomic
from qflux.io.secrets import redact
from qflux.runtime.charts import Line, Point, line_chart, number, smoothed
from qflux.runtime.run_folder import read_record
from qflux.runtime.tracking import METRICS, read_metrics

REPORT = "report.html"
_MOST_SHEETS = 12
_WIDEST = 1600  # pixels of an embedded picture
_HEAVIEST = 400_000  # bytes; a heavier picture is embedded as JPEG
_ENDS = {0: "done", 1: "ended by a bug", 2: "config or data", 3: "stopped itself", 74: "no space", 75: "locked"}

_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--text:#1d1d1f;--soft:#6b6b70;--rule:#e4e4e2;--ink:#2563c9;
--good:#1f7a45;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--page:#131316;--card:#1b1b1f;--text:#ececee;--soft:#9b9ba3;--rule:#303036;
--ink:#78a9ff;--good:#6fcf97;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:1120px;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.6rem;font-weight:650;margin:0}h2{font-size:1.1rem;font-weight:650;margin:2.5rem 0 .75rem}
p{margin:.25rem 0;color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.tiles,.charts,.samples{display:grid;gap:.9rem}
.tiles{grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:1.5rem}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.samples{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.tiles div,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.8rem 1rem;margin:0}
.tiles b{display:block;font-size:1.35rem;font-weight:600}.tiles span,figcaption span{color:var(--soft);font-size:.85rem}
figcaption{font-size:.9rem;overflow-wrap:anywhere}figcaption b{margin-left:.4rem}figcaption span{float:right}
figure+figure{margin-top:.9rem}.charts figure,.samples figure{margin-top:0}
i{font-style:normal;margin-left:.8rem}i::before{content:"";display:inline-block;width:14px;height:3px;margin-right:.35rem;
vertical-align:middle;border-radius:2px;background:var(--ink)}i.faint::before{opacity:.35}
svg{display:block;width:100%;height:auto;margin-top:.4rem}
svg text{fill:var(--soft);font-size:11px}svg text.y{text-anchor:end}.grid{stroke:var(--rule)}
polyline{fill:none;stroke:var(--ink);stroke-width:2;stroke-linejoin:round}
polyline.faint{stroke-width:1;opacity:.35}circle{fill:var(--ink)}
img{display:block;max-width:100%;height:auto;margin-top:.5rem;border-radius:4px}
.samples img{width:100%;image-rendering:pixelated}
table{border-collapse:collapse;width:100%;font-size:.88rem}
td,th{text-align:left;padding:.3rem .8rem .3rem 0;border-top:1px solid var(--rule);vertical-align:top;
overflow-wrap:anywhere}
th{font-weight:500;color:var(--soft);width:32%}summary{cursor:pointer;margin:.5rem 0}
"""


def write_report(run_dir: Path, end: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.html`` into a run folder, atomically, and return its path.

    ``end`` is what run.json will say of how the run ended, where it does not say it yet.
    """
    run_dir = Path(run_dir)
    record = {**(read_record(run_dir) or {}), **(end or {})}
    metrics = read_metrics(run_dir / METRICS)
    sections = [
        _head(run_dir, record, metrics),
        _curves(metrics),
        _per_sigma(metrics),
        _best_and_worst(run_dir),
        _sheets(run_dir),
        _settings(run_dir, record),
    ]
    title = escape(_title(run_dir))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
    )
    path = run_dir / REPORT
    atomic.write_text(path, page + "\n".join(section for section in sections if section) + "\n</body></html>\n")
    return path


def _title(run_dir: Path) -> str:
    resolved = run_dir.resolve()
    return f"{resolved.parent.name} {resolved.name}"


def _head(run_dir: Path, record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    code, steps = record.get("exit_code"), [line["step"] for line in metrics]
    reached = max([record.get("step") or 0, *steps])
    if code is None:
        state, kind = "running, or ended without a word", ""
    else:
        state, kind = _ENDS.get(code, f"interrupted (exit code {code})"), "good" if code == 0 else "bad"
    reason = redact(record.get("reason") or "")
    shown = escape(f"{state}: {reason}" if reason and reason != state else state)
    tiles = [("optimizer steps", f"{number(reached)} of {number(record.get('max_train_steps', reached))}")]
    losses = smoothed(_points(metrics, "loss"))
    if losses:
        tiles.append(("training loss, smoothed", number(losses[-1][1])))
    held_out = _points(metrics, "val_loss")
    if held_out:
        best = min(held_out, key=lambda point: point[1])
        tiles.append((f"lowest held-out loss, step {best[0]:.0f}", number(best[1])))
    speeds = [y for _, y in _points(metrics, "samples_per_second")]
    if speeds:
        tiles.append(("samples per second, median", number(statistics.median(speeds))))
    skipped = [y for _, y in _points(metrics, "skipped")]
    if any(skipped):
        tiles.append(("logged steps skipped: not finite", f"{number(sum(skipped))} of {number(len(skipped))}"))
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in tiles)
    trainer = escape(str(record.get("trainer", "")))
    return (
        f"<header><h1>{escape(_title(run_dir))}</h1><p>{trainer} · <span class='{kind}'>{shown}</span></p></header>"
        f"<div class=tiles>{boxes}</div>"
    )


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    loss = _points(metrics, "loss")
    charts = [
        line_chart("Training loss", [Line("each step", loss, "faint"), Line("smoothed", smoothed(loss))]),
        line_chart("Held-out loss", [Line("held out", _points(metrics, "val_loss"), "dots")]),
        line_chart("Learning rate", [Line("learning rate", _points(metrics, "lr"))]),
        line_chart("Gradient norm", [Line("gradient norm", _points(metrics, "grad_norm"))]),
        line_chart("Samples per second", [Line("samples per second", _points(metrics, "samples_per_second"))]),
    ]
    drawn = "".join(chart for chart in charts if chart)
    return f"<h2>Curves over optimizer steps</h2><div class=charts>{drawn}</div>" if drawn else ""


def _per_sigma(metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = [line for line in metrics if isinstance(line.get("val_loss_sigma"), dict) and line["val_loss_sigma"]]
    if not lines:
        return ""
    first, last = lines[0], lines[-1]
    rows = [("sigma", f"step {first['step']}", f"step {last['step']}")]
    for key, value in last["val_loss_sigma"].items():
        rows.append((key, _shown(first["val_loss_sigma"].get(key)), _shown(value)))
    return f"<h2>Held-out loss by sigma (1 = noise)</h2>{_table(rows)}"


def _best_and_worst(run_dir: Path) -> str:
    """The three best and three worst samples of the newest validation that has scores."""
    for folder in reversed(_sample_folders(run_dir)):
        scores = _scores(folder)
        if not scores:
            continue
        best = scores[:3]
        worst = [score for score in reversed(scores) if score not in best][:3]
        parts = [f"<h2>Best and worst samples, {escape(folder.name)}</h2>"]
        for label, chosen in (("Best", best), ("Worst", worst)):
            if chosen:
                figures = "".join(_scored(folder, score) for score in chosen)
                parts.append(f"<p>{label}</p><div class=samples>{figures}</div>")
        return "".join(parts)
    return ""


def _scores(folder: Path) -> list[dict[str, Any]]:
    """``scores.json`` of a validation, highest score first; a list of {name, score, metric}."""
    try:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    usable = [s for s in scores if isinstance(s, dict) and isinstance(s.get("score"), (int, float)) and "name" in s]
    return sorted((s for s in usable if not math.isnan(s["score"])), key=lambda s: (-s["score"], str(s["name"])))


def _scored(folder: Path, score: Mapping[str, Any]) -> str:
    name = str(score["name"])
    file = folder / f"{name}.png"
    picture = _picture(file, name) if Path(name).name == name and file.is_file() else ""
    caption = f"{escape(name)} <b>{number(score['score'])}</b> {escape(str(score.get('metric', '')))}"
    return f"<figure><figcaption>{caption}</figcaption>{picture}</figure>"


def _sheets(run_dir: Path) -> str:
    """A contact sheet for each validation, newest first; of many, evenly spread ones with the first and the last."""
    folders = _sample_folders(run_dir)
    if not folders:
        return ""
    shown = [folders[i] for i in evenly(len(folders), _MOST_SHEETS)]
    parts = ["<h2>Samples</h2>"]
    if len(shown) < len(folders):
        parts.append(f"<p>{len(shown)} of {len(folders)} validations; all are in the folder samples.</p>")
    for folder in reversed(shown):
        files = sorted(folder.glob("*.png"))
        sheets = [file for file in files if "sheet" in file.stem] or files
        pictures = "".join(_picture(file, f"{folder.name} {file.stem}") for file in sheets)
        if pictures:
            parts.append(f"<figure><figcaption>{escape(folder.name)}</figcaption>{pictures}</figure>")
    return "".join(parts) if len(parts) > 1 else ""


def _settings(run_dir: Path, record: Mapping[str, Any]) -> str:
    import yaml

    about = [(key, record.get(key)) for key in ("device", "commit", "data", "seed", "started_step")]
    about += [(f"version of {name}", version) for name, version in sorted((record.get("versions") or {}).items())]
    rows = [(key, str(value)) for key, value in about if value is not None]
    notes = "".join(f"<p>{escape(str(note))}</p>" for note in record.get("notes") or [])
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    settings = _table(list(_leaves(config))) if isinstance(config, dict) else ""
    details = f"<details open><summary>Settings</summary>{settings}</details>" if settings else ""
    if not rows and not details:
        return ""
    return f"<h2>The run</h2>{notes}{_table(rows)}{details}"


def _points(metrics: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), (int, float))]


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) else "–"


def _leaves(tree: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)


def _table(rows: Sequence[Sequence[str]]) -> str:
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f"<table>{body}</table>" if rows else ""


def _sample_folders(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "samples").glob("step-*") if path.is_dir())


def _picture(file: Path, label: str) -> str:
    """An ``<img>`` with the picture inside; a damaged picture is named instead."""
    from PIL import Image

    try:
        data, kind = file.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            scale = min(1.0, _WIDEST / image.width)
            if scale < 1 or len(data) > _HEAVIEST:
                size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
                stream, kind = io.BytesIO(), "jpeg"
                image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=88)
                data = stream.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return f"<p>{escape(file.name)} cannot be read</p>"
    return f'<img alt="{escape(label)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
