"""Two trained runs, checkpoints or adapters on held-out pairs: numbers, pictures and a report.

``python -m qflux.tools.compare RUN_A RUN_B [--data DIR] [--out DIR] [--count N] [--json FILE]``, or the same words
behind ``python run_tests.py --compare``.

Both are measured with the first one's ruler: its data sizes, noise levels, loss, seed and sampling steps.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflux.config import Config, LoraConfig, load_config
from qflux.config_values import DatasetEntry
from qflux.data.cache_manager import CacheManager
from qflux.data.dataset import EditDataset, open_dataset
from qflux.errors import DONE, NoSpace, QfluxError, UserError
from qflux.io.atomic import disk_error, write_json, write_text
from qflux.io.places import printable, refuse_file
from qflux.models import adapters
from qflux.models.loading import free, resolve_model, torch_dtype
from qflux.models.memory_rules import base_precision
from qflux.models.model_folder import needed_components
from qflux.parallel.placement import take_seat
from qflux.runtime.checkpoint import find_checkpoint, verify_checkpoint
from qflux.trainer import GROUP
from qflux.trainer.early import memo_of
from qflux.trainer.encoding import SampleReader, cache_manager, fill_cache
from qflux.trainer.sampling import load_trained
from qflux.trainer.setup import Shift
from qflux.validation.comparison import METRICS, answers, encode_texts, save_pictures, summary, text_table
from qflux.validation.held_out import HeldOut

if TYPE_CHECKING:
    from PIL import Image

    from qflux.types import EditSample

BASE = "base"
COUNT = 64
_UNITS = {"psnr": "dB", "seconds_per_image": "s"}
_STYLE = """
:root{color-scheme:light dark}
body{margin:0 auto;padding:2rem 1.25rem;max-width:1100px;font:15px/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .9rem .25rem 0;border-top:1px solid #8884;
text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto}
"""


@dataclass
class Side:
    """One of the two: how it was named, its config, its weights (a folder, an adapter file, or None = bare model)."""

    word: str
    config: Config
    weights: Path | None


def compare_runs(
    words: tuple[str, str],
    trainers: Mapping[str, type[Any]],
    *,
    data: Path | None = None,
    out: Path = Path("comparison"),
    count: int = COUNT,
) -> dict[str, Any]:
    """Measure both sides and write ``compare.json``, ``sheet.png``, the pictures and ``report.html`` into ``out``.

    words    for each side a run folder, a checkpoint, an adapter file, or ``base`` for the model without an adapter
    trainers name → class · data  folder of held-out pairs; None takes the first run's ``logging.validation.held_out``
    Returns what ``compare.json`` holds. Raises UserError where a side or the data cannot be found.
    """
    sides = open_sides(words)
    entries = _entries(sides[0].config, data)
    out.mkdir(parents=True, exist_ok=True)  # before hours of drawing
    measured: list[dict[str, Any]] = []
    pictures: dict[str, list[Image.Image]] = {}
    samples: list[EditSample] = []
    for letter, side in zip("AB", sides, strict=True):
        found, drawn, samples = _measure(side, trainers, entries, count)
        measured.append({"run": side.word, "weights": side.weights.name if side.weights else BASE, **found})
        pictures[letter] = drawn
    result = {"pairs": len(samples), "a": measured[0], "b": measured[1]}
    sheet = save_pictures(out, samples, pictures)
    write_json(out / "compare.json", result)
    write_text(out / "report.html", report(result, sheet.read_bytes()))
    return result


def open_sides(words: tuple[str, str]) -> tuple[Side, Side]:
    """Both sides; one without a config of its own (``base``, a lone adapter) borrows the other's. UserError if none."""
    configs = [_config_of(word) for word in words]
    if all(config is None for config in configs):
        raise UserError(
            f"--compare: neither {words[0]} nor {words[1]} lies in a run's folder, expected a config.yaml beside or "
            "above one of them; name a run folder or a checkpoint in it"
        )
    first, second = configs[0] or configs[1], configs[1] or configs[0]
    assert first is not None
    assert second is not None
    problems: list[str] = []
    weights = [_weights_of(word, problems) for word in words]
    if problems:
        raise UserError(*problems)
    sides = [Side(*parts) for parts in zip(words, (first, second), weights, strict=True)]
    for side, own in zip(sides, configs, strict=True):
        if own is None and side.weights is not None:
            side.config = _with_adapter(side.config, side.weights)
    sides[1].config = _same_ruler(sides[1].config, sides[0].config)
    return sides[0], sides[1]


def _config_of(word: str) -> Config | None:
    """The config of the run that a path lies in."""
    if word == BASE:
        return None
    path = Path(word).resolve()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml")
    return None


def _weights_of(word: str, problems: list[str]) -> Path | None:
    """A checkpoint folder, a folder with an adapter, an adapter file, or None for the bare model."""
    path = Path(word)
    if word == BASE:
        return None
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (path / "manifest.json").is_file():
        problems += [f"{path}: {problem}" for problem in verify_checkpoint(path)]
        return path
    found = find_checkpoint(path) if path.is_dir() else None
    if found is None and (path / adapters.WEIGHTS_FILE).is_file():
        return path
    if found is None:
        problems.append(
            f"--compare: found no weights at {path}, expected a run folder, a checkpoint, an adapter file or {BASE!r}"
        )
    return found


def _with_adapter(config: Config, weights: Path) -> Config:
    """The borrowed config with the rank, alpha and targets that a lone adapter file names."""
    file = weights if weights.is_file() else weights / adapters.WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"--compare: {weights} has no adapter and no run's config.yaml above it; name the run it is from"
        )
    saved = adapters.saved_config(file)
    if not saved:
        return config
    told: list[Any] = [saved.get(key) for key in ("r", "lora_alpha", "target_modules")]
    rank, alpha, targets = told
    names = [targets] if isinstance(targets, str) else targets
    problems = []
    if type(rank) is not int or rank < 1:
        problems.append(f"r {printable(ascii(rank))}, expected a whole number above 0")
    if type(alpha) not in (int, float) or not alpha > 0:
        problems.append(f"lora_alpha {printable(ascii(alpha))}, expected a number above 0")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        problems.append(f"target_modules {printable(ascii(targets))}, expected names of modules")
    if problems:
        raise UserError(*(f"--compare: {file}: found in its LoRA config {problem}" for problem in problems))
    lora = (config.model.lora or LoraConfig()).model_copy(
        update={
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": targets if isinstance(targets, str) else tuple(targets),
            "use_dora": bool(saved.get("use_dora")),
        }
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})


def _same_ruler(config: Config, ruler: Config) -> Config:
    """``config`` measured as ``ruler`` is: data sizes, loss, noise levels, seed and sampling steps."""
    data = ruler.data.model_copy(update={"max_sequence_length": config.data.max_sequence_length})
    train = config.train.model_copy(update={"loss": ruler.train.loss, "sigma": ruler.train.sigma})
    wanted = ruler.logging.validation
    validation = config.logging.validation.model_copy(
        update={"seed": wanted.seed, "num_inference_steps": wanted.num_inference_steps}
    )
    logging = config.logging.model_copy(update={"validation": validation})
    return config.model_copy(update={"data": data, "train": train, "logging": logging})


def _entries(config: Config, data: Path | None) -> Sequence[DatasetEntry]:
    if data is not None:
        return (DatasetEntry(path=data.resolve()),)
    entries = config.logging.validation.held_out
    if not entries:
        raise UserError(
            "--data: found none, and the first run's config has no logging.validation.held_out; "
            "name a folder of pairs that were not trained on"
        )
    return entries


def _measure(
    side: Side, trainers: Mapping[str, type[Any]], entries: Sequence[DatasetEntry], count: int
) -> tuple[dict[str, Any], list[Image.Image], list[EditSample]]:
    """(numbers, pictures, samples) of one side; its network is freed again."""
    trainer = _trainer(side, trainers)
    dataset = open_dataset(trainer.config.data, trainer.family, entries=entries, memo=memo_of(trainer.config))
    count = min(count, len(dataset))
    samples = [dataset.load(index) for index in range(count)]
    # Encoders first: they are gone again before the network comes to the device.
    texts, cache = encode_texts(trainer, samples), _filled_cache(trainer, dataset, count)
    model = _network(trainer, side.weights).to(trainer.device)
    losses = _losses(trainer, model, dataset, cache, count)
    pictures, seconds = answers(trainer, model, samples, texts, f"drawing {Path(side.word).name}")
    free(model)
    return {**losses, **summary(samples, pictures, seconds)}, pictures, samples


def _trainer(side: Side, trainers: Mapping[str, type[Any]]) -> Any:
    config = side.config
    if config.train.trainer not in trainers:
        raise UserError(
            f"train.trainer: {side.word} was trained with {config.train.trainer!r}, expected one of "
            f"{', '.join(sorted(trainers))}"
        )
    cls = trainers[config.train.trainer]
    model = config.model
    folder = resolve_model(model.pretrained_model_name_or_path, model.revision, needed_components(cls.family))
    dtype = torch_dtype(base_precision(config))
    return cls(config, folder, dtype=dtype, device=take_seat().device)


def _network(trainer: Any, weights: Path | None) -> Any:
    if weights is None or weights.is_dir():
        return load_trained(trainer, weights)
    model = trainer.load(trainer.family.denoiser)
    adapters.add_adapter(model, trainer.config.model.lora, trainer.family, trainer.config.train.seed)
    adapters.load_adapter(weights, model)
    return model


def _filled_cache(trainer: Any, dataset: EditDataset, count: int) -> CacheManager | None:
    if not trainer.config.cache.use_cache:
        return None
    cache = cache_manager(trainer, memo_of(trainer.config))
    fill_cache(trainer, cache, [dataset.spec(index) for index in range(count)], dataset.load)
    return cache


def _losses(trainer: Any, model: Any, dataset: EditDataset, cache: CacheManager | None, count: int) -> dict[str, Any]:
    """Held-out loss, and the same for each noise level; None where it cannot be measured."""
    reader = SampleReader(trainer, dataset, cache)
    held_out = HeldOut(trainer, reader.read, count, Shift.of(trainer))
    held_out.count = count
    with adapters.rounded_copy(model, trainer.dtype):
        found = held_out.measure(model)
    if found is None:
        return {"loss": None, "loss_sigma": {}}
    return {"loss": found[0], "loss_sigma": {f"{sigma:g}": value for sigma, value in found[1].items()}}


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """One row a measure: name, A, B, B − A; measures that neither side has are left out."""
    a, b = result["a"], result["b"]
    pairs = [("held-out loss", a["loss"], b["loss"])]
    pairs += [(f"  at sigma {sigma}", value, b["loss_sigma"].get(sigma)) for sigma, value in a["loss_sigma"].items()]
    for name in (*METRICS, "seconds_per_image"):
        unit = _UNITS.get(name.partition("_inside")[0].partition("_outside")[0], "")
        label = {"iou": "mask IoU"}.get(name, name.replace("psnr", "PSNR").replace("ssim", "SSIM").replace("_", " "))
        pairs.append((f"{label} [{unit}]" if unit else label, a[name], b[name]))
    return [
        [label, _shown(first), _shown(second), _shown(None if None in (first, second) else second - first, "+")]
        for label, first, second in pairs
        if (first, second) != (None, None)
    ]


def _shown(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


def table(result: Mapping[str, Any]) -> str:
    """The comparison as aligned text."""
    head = f"A = {result['a']['run']} ({result['a']['weights']})\nB = {result['b']['run']} ({result['b']['weights']})"
    return f"{head}\n{result['pairs']} held-out pairs\n" + text_table(["measure", "A", "B", "B - A"], rows_of(result))


def report(result: Mapping[str, Any], sheet: bytes) -> str:
    """A page with both tables and the sheet inside; it needs no network and no script."""
    a, b = result["a"], result["b"]
    names = [name for name in METRICS if any(row[name] is not None for row in (*a["samples"], *b["samples"]))]
    header = ["pair", *(f"{name} {letter}".replace("_", " ") for name in names for letter in "AB")]
    pairs = [
        [f"{one['id']}: {one['prompt']}", *(_shown(row[name]) for name in names for row in (one, other))]
        for one, other in zip(a["samples"], b["samples"], strict=True)
    ]
    picture = base64.b64encode(sheet).decode()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>comparison</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Comparison on {result['pairs']} held-out pairs</h1>\n"
        + "".join(
            f"<p>{letter}: {escape(side['run'])} ({escape(side['weights'])})</p>"
            for letter, side in (("A", a), ("B", b))
        )
        + _html_table(["measure", "A", "B", "B − A"], rows_of(result))
        + f'<img alt="control, A, B, target" src="data:image/png;base64,{picture}">\n'
        + _html_table(header, pairs)
        + "</body></html>\n"
    )


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>\n"


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """What a comparison takes besides the two runs."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="held-out pairs; default: those of RUN_A's config")
    parser.add_argument("--out", type=Path, default=Path("comparison"), metavar="DIR", help="where results go")
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"most pairs to draw, default {COUNT}")


def run(words: tuple[str, str], args: argparse.Namespace, trainers: Mapping[str, type[Any]]) -> int:
    """Compare and print the table."""
    if args.count < 1:
        raise UserError(f"--count: found {args.count}, expected at least 1")
    refuse_file(args.out, "--out", "name another one")
    result = compare_runs(words, trainers, data=args.data, out=args.out, count=args.count)
    print(table(result))
    print(f"pictures, compare.json and report.html: {args.out}")
    if args.json is not None:
        write_json(args.json, result)
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; expected failures become one line and an exit code."""
    parser = argparse.ArgumentParser(prog="qflux.tools.compare", description="Compare two runs on held-out pairs.")
    parser.add_argument("runs", nargs=2, metavar="RUN", help="run folder, checkpoint, adapter file, or `base`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    add_arguments(parser)
    args = parser.parse_args(argv)
    trainers = {p.name: p.load() for p in entry_points(group=GROUP)}
    return ended(lambda: run((args.runs[0], args.runs[1]), args, trainers), args.json)


def ended(mode: Callable[[], int], results: Path | None) -> int:
    """Run one mode, whose ``results`` file must be possible; expected failures become one line and an exit code."""
    try:
        if results is not None:
            refuse_file(results.parent, "--json", "name another file")
            if results.is_dir():
                raise UserError(f"--json: found {results}, a folder, expected a file")
        return mode()
    except (QfluxError, OSError) as error:
        failed = error if isinstance(error, QfluxError) else disk_error(error)
        if failed is None:
            raise
        if isinstance(error, OSError) and not isinstance(failed, NoSpace):
            failed = UserError(f"{error.filename}: {error.strerror}; name another place with --out or --json")
        print(failed, file=sys.stderr)
        return failed.exit_code


if __name__ == "__main__":
    sys.exit(main())
