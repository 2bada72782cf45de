"""Whole folders of strangers: checkpoints with a manifest that fits them, and data sets of the hub's forms."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from faults.hostile import entry, headers, linked, pickles, tensors, trees
from faults.hostile_slots import CONVERT, DATA, HEADER, Base, Case

from qflux.io.digests import canonical_json, xxh3

ADAPTER = "pytorch_lora_weights.safetensors"
Files = Mapping[str, bytes | str]  # a word stands for the pickle of that kind


def _bytes(files: Files | None, base: Base) -> dict[str, bytes]:
    known = pickles(base.canary)
    return {name: known[data] if isinstance(data, str) else data for name, data in (files or {}).items()}


def signed(folder: Path, changes: Mapping[str, Any]) -> None:
    """Write the manifest anew, so that every size and digest fits; ``changes`` replace its keys."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {name: {"size": (folder / name).stat().st_size, "xxh3": xxh3(folder / name)} for name in sorted(names)}
    files.pop("manifest.json")
    (folder / "manifest.json").unlink()
    made = {**manifest, "files": files, **changes}
    made.pop("xxh3", None)
    made["xxh3"] = xxh3(canonical_json(made).encode())
    (folder / "manifest.json").write_text(json.dumps(made))


def _checkpoint(
    files: Files | None = None,
    links: Mapping[str, str] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, base: Base) -> list[object]:
        bad = _bytes(files, base)
        place = linked(base.checkpoint, folder / base.checkpoint.name, {**bad, **dict.fromkeys(links or {})})
        (folder / "private").write_bytes(b"private")
        for name, target in (links or {}).items():
            (place / name).symlink_to(target)
        if "manifest.json" not in bad:
            signed(place, manifest or {})
        return ["--resume", place]

    return make


def checkpoints() -> Iterator[Case]:
    """A checkpoint to go on from."""

    def case(name: str, found: str, *args: Any, **kwargs: Any) -> Case:
        return Case(f"checkpoint-{name}", _checkpoint(*args, **kwargs), found, [])

    size = {"size": 7, "xxh3": xxh3(b"private")}
    for name in ("../private", "/etc/hostname", "x/../../private", "..", "", "./../private"):
        yield case(f"lists-{name.replace('/', '_')}", "outside the checkpoint", manifest={"files": {name: size}})
    yield case("link-out", "outside the checkpoint", links={"extra.json": "../private"})
    yield case("link-for-weights", "outside the checkpoint", links={ADAPTER: "../private"})
    for name, data in trees().items():
        yield case(f"manifest-{name}", r"manifest\.json", {"manifest.json": data})
        yield case(f"state-{name}", r"state\.json", {"state.json": data})
        yield case(f"tree-{name}", r"optimizer\.json|do not belong to this run", {"optimizer.json": data})
    for key, value in (
        ("files", []),
        ("files", None),
        ("files", {"a": 5}),
        ("files", {"a": {"size": "x", "xxh3": []}}),
        ("step", "os.system"),
        ("step", -1),
        ("identity", [1]),
        ("identity", None),
    ):
        yield case(f"{key}-{json.dumps(value)}", r"manifest\.json", manifest={key: value})
    for kind in ("framed", "torch"):
        yield case(f"adapter-{kind}", CONVERT, {ADAPTER: kind})
        yield case(f"optimizer-{kind}", CONVERT, {"optimizer.safetensors": kind})
    for kind in ("overlap", "deep", "negative-side", "many-objects", "gap", "twice"):
        yield case(f"adapter-{kind}", HEADER, {ADAPTER: headers()[kind]})
        yield case(f"optimizer-{kind}", HEADER, {"optimizer.safetensors": headers()[kind]})
    yield case("adapter-other", "0 of", {ADAPTER: tensors({"a": entry()})})
    lost = b'{"dict": [["state", {"dict": [[0, {"dict": [["exp_avg", {"tensor": "x"}]]}]]}], ["param_groups", []]]}'
    yield case("optimizer-lost-tensor", r"optimizer\.json", {"optimizer.json": lost})
    yield from states()
    for name, data in (("kind", b'{"call": "os.system"}'), ("bits", b'{"float": "zz"}'), ("two", b'{"a": 1, "b": 2}')):
        yield case(f"optimizer-{name}", r"optimizer\.json", {"optimizer.json": data})


Tree = dict[str, Any]


def _changed(name: str, change: Callable[[Any], object]) -> Callable[[Path, Base], list[object]]:
    """A checkpoint with one JSON file, or the header of one file of tensors, changed in place."""

    def make(folder: Path, base: Base) -> list[object]:
        data = (base.checkpoint / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else 0
        tree = json.loads(data[8:end] if end else data)
        change(tree)
        return _checkpoint({name: tensors(tree, data[end:]) if end else json.dumps(tree).encode()})(folder, base)

    return make


def states() -> Iterator[Case]:
    """Checkpoints whose manifest fits, with states that are not of this run or no step could go on from."""

    def entry_of(table: Tree, word: str) -> Tree:
        return next(value for key, value in sorted(table.items()) if word in key and len(value["shape"]) == 2)

    def optimizer(tree: Tree) -> tuple[Tree, Tree]:
        inner = dict(tree["dict"])
        return inner["state"], inner["param_groups"][0]

    def renamed(table: Tree) -> None:
        table["another"] = table.pop(max(key for key in table if "exp_avg" in key))

    def set_in(pairs: Tree, key: object, value: Any) -> None:
        next(pair for pair in pairs["dict"] if pair[0] == key)[1] = value

    def wrapped(slots: Tree) -> tuple[int, list[Any]]:
        pairs = slots["dict"][0][1]["dict"]
        place = next(place for place, pair in enumerate(pairs) if pair[0] == "step")
        return place, ["step", {"tuple": [pairs[place][1]]}]

    other: dict[str, tuple[str, Callable[[Tree], object]]] = {
        "other-shape": (r"optimizer.*parameter \d+: exp_avg is \[\d+, \d+\] of float32, expected \[",
                        lambda table: entry_of(table, "exp_avg")["shape"].reverse()),
        "flat": (r"exp_avg_sq is \[\d+\] of float32, expected \[\d+, \d+\]",
                 lambda table: entry_of(table, "exp_avg_sq").update(shape=[
                     math.prod(entry_of(table, "exp_avg_sq")["shape"])])),
        "other-dtype": ("of int32, expected .* of float32",
                        lambda table: entry_of(table, "exp_avg").update(dtype="I32")),
        "renamed": ("'another' is named nowhere", renamed),
        "added": ("'another' is named nowhere", lambda table: table.update(another=entry(0, 0, (0,)))),
    }  # fmt: skip
    for name, (found, change) in other.items():
        yield Case(f"checkpoint-optimizer-{name}", _changed("optimizer.safetensors", change), found, [])
    numbers: dict[str, tuple[str, Callable[[Tree, Tree], object]]] = {
        "less": (r"parameter 0: found \['exp_avg_sq', 'step'\], expected", lambda slots, _: _without(slots, "exp_avg")),
        "more": (r"parameter 0: found .*'more'", lambda slots, _: slots["dict"][0][1]["dict"].append(["more", 1])),
        "no-parameter": (r"state: found other entries", lambda slots, _: slots["dict"][0].__setitem__(0, 10_000)),
        "step-in-a-tuple": (r"step is \(tensor\(1\.\),\), expected \[\] of float32",
                            lambda slots, _: slots["dict"][0][1]["dict"].__setitem__(*wrapped(slots))),
        "fewer-parameters": ("holds 1 parameters, the model trains", lambda _, group: set_in(group, "params", [0])),
        "rate-a-text": ("param_groups: lr is 'x', expected a number", lambda _, group: set_in(group, "lr", "x")),
        "rate-huge": ("param_groups: lr is 1e", lambda _, group: set_in(group, "lr", 1e300)),
    }  # fmt: skip
    for name, (found, change_both) in numbers.items():
        made = _changed("optimizer.json", lambda tree, change=change_both: change(*optimizer(tree)))
        yield Case(f"checkpoint-optimizer-{name}", made, found, [])
    for key, value in (("step", -1), ("step", 7), ("samples", 0), ("batch", 0), ("seed", 1 << 70), ("step", True)):
        made = _changed("state.json", lambda tree, key=key, value=value: tree.update({key: value}))
        yield Case(f"checkpoint-state-{key}-{value}", made, r"state\.json.*expected", [])
    for value in (-1, 7, "1", None, 1 << 70):
        made = _changed("schedule.json", lambda tree, value=value: set_in(tree, "step", value))
        yield Case(f"checkpoint-schedule-{value}", made, r"schedule\.json: step is .*, expected 1", [])


def _without(slots: Tree, key: str) -> None:
    """Leave a value of the first parameter out; its tensor goes on to be named elsewhere."""
    pairs = slots["dict"][0][1]["dict"]
    left = next(pair for pair in pairs if pair[0] == key)
    pairs.remove(left)
    slots["dict"][1][1]["dict"].append(["another", left[1]])


def hubs() -> Iterator[Case]:
    """Folders of ``save_to_disk`` and of parquet files."""

    def case(
        name: str, found: str, form: str, files: Files | None = None, links: Mapping[str, str] | None = None
    ) -> Case:
        def make(folder: Path, base: Base) -> list[object]:
            source = base.saved if form == "saved" else base.parquet
            place = linked(source, folder / "set", {**_bytes(files, base), **dict.fromkeys(links or {})})
            linked(source, folder / "elsewhere", {})
            for key, target in (links or {}).items():
                (place / key).symlink_to(target)
            return [f"{DATA}={place}"]

        return Case(f"hub-{form}-{name}", make, found)

    arrow, table = "data-00000-of-00001.arrow", "train-00000-of-00001.parquet"
    for name in (f"../elsewhere/{arrow}", "/etc/hostname", "../../../../etc/hostname"):
        state = json.dumps({"_data_files": [{"filename": name}]}).encode()
        yield case(f"names-{name.replace('/', '_')}", "expected files inside it", "saved", {"state.json": state})
        listed = json.dumps({"splits": [name]}).encode()
        yield case(
            f"splits-{name.replace('/', '_')}", "expected files inside it", "saved", {"dataset_dict.json": listed}
        )
    yield case("link", "expected files inside it", "saved", links={arrow: f"../elsewhere/{arrow}"})
    yield case("pickle", "cannot be opened", "saved", {arrow: "framed"})
    for name, data in trees().items():
        if name != "nan":
            yield case(f"state-{name}", "cannot be opened", "saved", {"state.json": data})
    for kind in ("framed", "torch", "npy"):
        yield case(f"pickle-{kind}", "cannot be opened", "parquet", {table: kind})
    yield case("link", "link out of the data set", "parquet", links={table: f"../elsewhere/{table}"})
    packed = {f"train-{number}.tar": archive() for number in range(4)}
    yield case("tar", "is a data set of the kind|cannot be opened", "parquet", packed)
    yield case("row-outside", "outside of the data set", "parquet", {table: rows("/etc/hostname")})
    yield case("row-climbs", "outside of the data set", "parquet", {table: rows("../elsewhere/a.png")})
    yield case("row-of-other-types", "cannot be read", "parquet", {table: rows("a.png", typed=False)})


def archive() -> bytes:
    """A tar whose members a reader of web data sets would unpickle, and one that climbs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("0.pth", "0.png", "../../climbs.txt"):
            info = tarfile.TarInfo(name)
            info.size = 10
            tar.addfile(info, io.BytesIO(b"0123456789"))
    return stream.getvalue()


def rows(path: str, typed: bool = True) -> bytes:
    """A parquet file with one row whose picture is a path; ``typed`` as a picture's column is."""
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.struct({"bytes": pyarrow.binary() if typed else pyarrow.null(), "path": pyarrow.string()})
    pictures = pyarrow.array([{"bytes": None, "path": path}], kind)
    table = pyarrow.table({"target_image": pictures, "prompt": ["x"]})
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()
