"""Files that were fine, hurt at random in the place where a stranger hands them over.

Headers, JSON trees, YAML and tables are changed so that they still parse as such, or byte by byte. What comes of it
must be a refusal or a run like any other.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.amounts import dice
from faults.hostile import linked, tensors
from faults.hostile_folders import signed
from faults.hostile_slots import DATA, LORA, MODEL, WEIGHTS, Base, Case
from faults.media import encoded, scene

Harm = Callable[[bytes, random.Random], bytes]
Slot = Callable[[Path, Base, random.Random], list[object]]

NAN = float("nan")
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, NAN, 1 << 31, 1 << 40, 1 << 63, 10**30, "", "x", "0", "..",
    "../../x", "/etc/hostname", "os.system", "a\0b", "\ud800", "\n", "9" * 5000, [], {}, [0], [[]], ["x"], {"a": 1},
    {"tensor": "x"}, {"float": "zz"}, {"tuple": 1},
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I8", "U8", "BOOL", "C64", "F4", "x")
ONE_STEP = ("train.max_train_steps=1", "logging.report_to=none")


def damaged_case(number: int, hub: bool = False) -> Case:
    """The ``number``-th: a slot, a file in it, a harm; of a data set in a form of the hub where ``hub`` says so."""
    slot = hub_set if hub else dice(number).choice(SLOTS)
    made: Slot = slot
    return Case(f"damage-{slot.__name__}-{number}", lambda folder, base: made(folder, base, dice(number)), "", [])


def adapter(folder: Path, base: Base, chances: random.Random) -> list[object]:
    """The adapter to start from, to check or to export."""
    path = folder / "adapter.safetensors"
    path.write_bytes(hurt(path.name, (base.checkpoint / "pytorch_lora_weights.safetensors").read_bytes(), chances))
    starts: list[object] = [f"{LORA}={path}", *writes(folder)]
    exports: list[object] = ["--export", chances.choice(("kohya", "comfyui", "diffusers")), "--adapter", path]
    return chances.choice(([*starts, "--check"], [*starts, *ONE_STEP], [*exports, "--out", folder / "out.safetensors"]))


def model(folder: Path, base: Base, chances: random.Random) -> list[object]:
    """One of the files of a model's folder."""
    files = {path.relative_to(base.model).as_posix(): path for path in sorted(base.model.rglob("*")) if path.is_file()}
    name = chances.choice([*files, *(name for name in files if name.endswith(".json")), *INDEXES])
    data = index(base, name) if name in INDEXES else files[name].read_bytes()
    place = linked(base.model, folder / "model", {name: hurt(name, data, chances)})
    words: list[object] = [f"{MODEL}={place}", *writes(folder)]
    return chances.choice(([*words, "--check"], [*words, "--cache"], [*words, *ONE_STEP]))


INDEXES = tuple(f"{component}/{file}.index.json" for component, file in WEIGHTS.items() if component != "vae")


def index(base: Base, name: str) -> bytes:
    """An index that says of every tensor of a component where it lies."""
    file = base.model / name.removesuffix(".index.json")
    table, _ = parts(file.read_bytes())
    names = {key: file.name for key in table if key != "__metadata__"}
    return json.dumps({"metadata": {"total_size": file.stat().st_size}, "weight_map": names}).encode()


def table_set(folder: Path, _: Base, chances: random.Random) -> list[object]:
    """A table of a data set, or one of its captions."""
    for stem in ("a", "b", "c"):
        (folder / f"{stem}.png").write_bytes(encoded(scene()))
        (folder / f"{stem}.txt").write_text("make it so")
    rows = [{"path_target": f"{stem}.png", "path_control": "a.png", "prompt": f"make, it {stem}"} for stem in "abc"]
    lines = {"jsonl": [json.dumps(row) for row in rows]}
    lines["csv"] = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
    suffix = chances.choice(("csv", "jsonl", "txt"))
    name = "a.txt" if suffix == "txt" else f"metadata.{suffix}"
    data = "\n".join(lines.get(suffix, ["make it so"])).encode()
    (folder / name).write_bytes(hurt(name, data, chances))
    return [f"{DATA}={folder}", "data.allow_missing_controls=true", *writes(folder), "--check"]


def hub_set(folder: Path, base: Base, chances: random.Random) -> list[object]:
    """A file of a saved data set, or a parquet file."""
    source = chances.choice((base.saved, base.parquet))
    files = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    name = chances.choice(files)
    place = linked(source, folder / "set", {name: hurt(name, (source / name).read_bytes(), chances)})
    return ["--config", base.config, f"{DATA}={place}", *writes(folder), "--check"]


def checkpoint(folder: Path, base: Base, chances: random.Random) -> list[object]:
    """A file of a checkpoint, nearly always with a manifest that fits."""
    files = [path.relative_to(base.checkpoint).as_posix() for path in sorted(base.checkpoint.rglob("*"))]
    name = chances.choice([*files, "optimizer.safetensors", "optimizer.json"])
    data = hurt(name, (base.checkpoint / name).read_bytes(), chances)
    place = linked(base.checkpoint, folder / base.checkpoint.name, {name: data})
    if name != "manifest.json" and chances.random() < 0.95:
        signed(place, {})
    if chances.random() < 0.8:
        return ["--resume", place, *writes(folder)]
    return chances.choice((["--push", "a/b", "--checkpoint", place, "--out", folder / "out", *writes(folder)],
                           ["--export", "kohya", "--adapter", place, "--out", folder / "out.safetensors"]))  # fmt: skip


def run(folder: Path, base: Base, chances: random.Random) -> list[object]:
    """A file that a run keeps beside its checkpoints."""
    place = folder / "runs" / "fine" / "v1"
    shutil.copytree(base.checkpoint.parent, place)
    name = chances.choice(("run.json", "run.json", "metrics.jsonl", "config.yaml"))
    (place / name).write_bytes(hurt(name, (place / name).read_bytes(), chances))
    resume: list[object] = ["--resume", chances.choice((place, "auto"))]
    push: list[object] = ["--push", "a/b", "--checkpoint", chances.choice((place, place / base.checkpoint.name))]
    words = chances.choice((resume, resume, [*push, "--out", folder / "out"]))
    return [*words, *writes(folder), "train.max_train_steps=3"]


def config(folder: Path, base: Base, chances: random.Random) -> list[object]:
    """The text of a config; places in it come last, so that no harm leads elsewhere."""
    text = base.config.read_text()
    for place, name in ((base.model, "MODEL"), (base.data, "DATA"), (base.config.parent, "HERE")):
        text = text.replace(str(place), f"@{name}@")
    data = hurt("run.yaml", text.encode(), chances)
    for place, name in ((base.model, "MODEL"), (base.data, "DATA"), (folder, "HERE")):
        data = data.replace(f"@{name}@".encode(), str(place).encode())
    (folder / "run.yaml").write_bytes(data)
    return ["--config", folder / "run.yaml", *writes(folder), "--check"]


SLOTS: tuple[Slot, ...] = (
    adapter,
    adapter,
    model,
    model,
    model,
    table_set,
    checkpoint,
    checkpoint,
    checkpoint,
    run,
    config,
)


def writes(folder: Path) -> list[object]:
    """Words that keep what a case writes in its folder."""
    return [f"logging.output_dir={folder / 'runs'}", f"cache.cache_dir={folder / 'cache'}"]


def hurt(name: str, data: bytes, chances: random.Random) -> bytes:
    """A file's bytes, hurt as fits its kind."""
    known: dict[str, tuple[Harm, ...]] = {
        "safetensors": (header_changed, header_changed, header_changed, raw),
        "json": (tree_changed, tree_changed, tree_changed, raw),
        "jsonl": (line_changed, words_changed, raw),
        "yaml": (words_changed, words_changed, raw),
        "csv": (words_changed, raw),
    }
    for _ in range(chances.choice((1, 1, 1, 2))):
        data = chances.choice(known.get(name.rpartition(".")[2], (raw,)))(data, chances)
    return data


def raw(data: bytes, chances: random.Random) -> bytes:
    """Bits flipped, an end cut off, a stretch zeroed, repeated or left out: at the beginning, the end or anywhere."""
    size = max(len(data), 1)
    near = chances.choice((min(64, size), min(4096, size), size))
    at = chances.randrange(near)
    at = size - 1 - at if chances.random() < 0.2 else at
    length = chances.choice((1, 2, 8, 64))
    what = chances.choice(("flip", "flip", "flip", "cut", "zero", "repeat", "gone"))
    if what == "flip":
        out = bytearray(data)
        for place in {at, *(chances.randrange(near) for _ in range(length - 1))} if data else ():
            out[place] ^= 1 << chances.randrange(8)
        return bytes(out)
    stretch = data[at : at + length]
    made = {"cut": b"", "zero": bytes(len(stretch)), "repeat": stretch * chances.choice((2, 40)), "gone": b""}[what]
    return data[:at] + made + (b"" if what == "cut" else data[at + length :])


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header's table and the tensors' bytes of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def header_changed(data: bytes, chances: random.Random) -> bytes:
    """One tensor's dtype, shape, place or name, the metadata, or anything of the header."""
    try:
        table, body = parts(data)
        name = chances.choice([name for name in table if name != "__metadata__"])
        entry, what = table[name], chances.choice(sorted(HEADERS))
        return HEADERS[what](table, name, entry, body, chances)
    except (ValueError, LookupError, TypeError, AttributeError):  # it was hurt before
        return raw(data, chances)


def _dtype(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    entry["dtype"] = chances.choice(DTYPES)
    return tensors(table, body)


def _shape(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    shape = entry["shape"]
    first, last = shape[0], shape[-1]
    entry["shape"] = chances.choice((shape[::-1], [*shape, 1], [1, *shape], [first * last], [-1, *shape[1:]], shape[1:],
                                     [first * 2, *shape[1:]], [first + 1, *shape[1:]], [0, *shape],
                                     [*shape[:-1], last // 2, 2], [1 << 40, *shape]))  # fmt: skip
    return tensors(table, body)


def _cut(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    """A smaller tensor, and offsets that fit."""
    start, end = entry["data_offsets"]
    less = (end - start) // max(entry["shape"][0], 1)
    entry["shape"] = [entry["shape"][0] - 1, *entry["shape"][1:]]
    for other in (one for key, one in table.items() if key != "__metadata__"):
        other["data_offsets"] = [at - less if at >= end else at for at in other["data_offsets"]]
    return tensors(table, body[: end - less] + body[end:])


def _offsets(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    start, end = entry["data_offsets"]
    entry["data_offsets"] = chances.choice(
        ([end, start], [start + 4, end + 4], [start, end + 4], [0, end], [start, start])
    )
    return tensors(table, body)


def _name(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    new = chances.choice((f"{name}x", "", "..", name.upper(), name[1:], "x\n", "\ud800", chances.choice(list(table))))
    table[new] = table.pop(name)
    return tensors(table, body)


def _gone(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    """No such tensor, and offsets that fit."""
    start, end = table.pop(name)["data_offsets"]
    for other in (one for key, one in table.items() if key != "__metadata__"):
        other["data_offsets"] = [at - (end - start) if at >= end else at for at in other["data_offsets"]]
    return tensors(table, body[:start] + body[end:])


def _more(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    """One tensor more, and offsets that fit."""
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    new = chances.choice(("x", f"{name}.x", name.replace("0", "1"), name.replace("1", "7")))
    table[new] = {**entry, "data_offsets": [len(body), len(body) + size]}
    return tensors(table, body + bytes(size))


def _twice(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    return tensors(f"{json.dumps(table)[:-1]},{json.dumps(name)}:{json.dumps(entry)}}}".encode(), body)


def _metadata(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    known = table.get("__metadata__") or {"format": "pt"}
    key = chances.choice(list(known))
    new = json.loads(tree_changed(known[key].encode(), chances)) if known[key][:1] == "{" else chances.choice(ODD)
    whole = chances.choice((new, None if new is None else str(new), json.dumps(new), json.dumps(new), json.dumps(new)))
    table["__metadata__"] = {**known, key: whole}
    return tensors(table, body)


def _anything(table: Any, name: str, entry: Any, body: bytes, chances: random.Random) -> bytes:
    return tensors(tree_changed(json.dumps(table).encode(), chances), body)


HEADERS: dict[str, Callable[[Any, str, Any, bytes, random.Random], bytes]] = {
    "dtype": _dtype, "shape": _shape, "cut": _cut, "offsets": _offsets, "name": _name, "gone": _gone, "more": _more,
    "twice": _twice, "metadata": _metadata, "anything": _anything,
}  # fmt: skip


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) of a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(value)


def tree_changed(data: bytes, chances: random.Random) -> bytes:
    """One value of a JSON tree is another, of another type, gone, moved, renamed or there twice."""
    try:
        tree = json.loads(data)
        holder, key = chances.choice(list(places(tree)))
    except (ValueError, LookupError):
        return raw(data, chances)
    value, what = holder[key], chances.choice(("odd", "odd", "odd", "near", "gone", "swapped", "renamed", "twice"))
    if what == "near":
        number = value if isinstance(value, (int, float)) else 1
        holder[key] = chances.choice(
            (-number, number + 1, number * 2, number * 1000, [value], {"x": value}, str(value))
        )
    elif what == "gone":
        del holder[key]
    elif what == "swapped":
        other, place = chances.choice(list(places(tree)))
        if not any(inner is other for inner, _ in places(value)) and other[place] is not tree:
            holder[key] = json.loads(json.dumps(other[place]))
    elif what == "renamed" and isinstance(holder, dict):
        holder[chances.choice((f"{key}x", "", key[1:], "auto_map", "_class_name", "__class__"))] = holder.pop(key)
    elif what == "twice" and isinstance(tree, dict):
        first = next(iter(tree))
        return f"{json.dumps(tree)[:-1]},{json.dumps(first)}:{json.dumps(chances.choice(ODD))}}}".encode()
    else:
        holder[key] = chances.choice(ODD)
    return json.dumps(tree).encode()


def line_changed(data: bytes, chances: random.Random) -> bytes:
    """One line of JSON, as ``tree_changed``."""
    lines = data.split(b"\n")
    at = chances.randrange(len(lines))
    lines[at] = tree_changed(lines[at], chances)
    return b"\n".join(lines)


def words_changed(data: bytes, chances: random.Random) -> bytes:
    """One word, line or indentation of a text is another, gone, moved or there twice."""
    between = chances.choice((b"\n", b"\n", b" ", b",", b":"))
    words = data.split(between)
    at, to = chances.randrange(len(words)), chances.randrange(len(words))
    odd = chances.choice(ODD)
    text = chances.choice(
        (json.dumps(odd), str(odd), "!!python/name:os.system", "&a", "*a", "~", "- x", "{", '"', "? ")
    )
    new = text.encode(errors="surrogatepass")
    what = chances.choice(("odd", "odd", "gone", "moved", "twice", "indented"))
    if what == "odd":
        words[at] = words[at].rpartition(b" ")[0] + b" " + new if between == b"\n" else new
    elif what == "indented":
        words[at] = b"  " + words[at]
    else:
        word = words[at] if what == "twice" else words.pop(at)
        if what != "gone":
            words.insert(to, word)
    return between.join(words)
