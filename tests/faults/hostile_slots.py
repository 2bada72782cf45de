"""Every slot that a stranger's file can lie in: config, adapter, model, data set, checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.hostile import entry, headers, linked, pickles, tensors, trees
from faults.media import encoded, scene

MODEL, DATA, LORA = "model.pretrained_model_name_or_path", "data.dataset_path", "model.lora.pretrained_weight"
CONVERT = "convert them to safetensors"
HEADER = "not a readable safetensors file"


@dataclass
class Base:
    """What is fine: a config, a model, a data set in three forms, a checkpoint; and where the canary would sit."""

    config: Path
    model: Path
    data: Path
    saved: Path
    parquet: Path
    checkpoint: Path
    canary: Path


@dataclass
class Case:
    """``make(folder, base)`` writes the files and gives the words of a command line; ``found`` is in what it says."""

    name: str
    make: Callable[[Path, Base], list[object]]
    found: str
    words: list[object] = field(default_factory=lambda: ["--check"])

    def argv(self, folder: Path, base: Base) -> list[object]:
        """The whole command line; a config among the words stands in for the fine one."""
        folder.mkdir(parents=True)
        words = [*self.make(folder, base), *self.words]
        return words if "--config" in words else ["--config", base.config, *words]


def configs() -> Iterator[Case]:
    """YAML that runs, refers, explodes or names what is in no registry."""
    refused = "tags such as"
    texts = {
        "tag-apply": ("!!python/object/apply:os.system ['touch {canary}']", refused),
        "tag-new": ("!!python/object/new:os.system ['touch {canary}']", refused),
        "tag-object": ("!!python/object:os.system {{}}", refused),
        "tag-name": ("!!python/name:os.system", refused),
        "tag-module": ("!!python/module:os", refused),
        "tag-tuple": ("!!python/tuple [1]", refused),
        "tag-binary": ("!!binary aGk=", refused),
        "tag-set": ("!!set {{a}}", refused),
        "tag-own": ("!exec touch {canary}", refused),
        "tag-uri": ("!<tag:yaml.org,2002:python/object/apply:os.system> ['x']", refused),
        "anchor": ("&a 1", "anchors"),
        "alias": ("*a", "anchors"),
        "deep-list": ("[" * 50_000 + "]" * 50_000, "nested more than"),
        "deep-map": ("{{a: " * 5_000 + "1" + "}}" * 5_000, "nested more than"),
        "digits": ("9" * 500_000, "expected"),
        "zero-byte": ("a\0b", "not allowed"),
        "escape": ('"\\x00"', "U\\+0000"),
        "half-character": ('"\\ud800"', "U\\+D800"),
    }
    for name, (value, found) in texts.items():
        yield Case(f"config-{name}", _config_text("train:\n  seed: " + value), found)
    bomb = "a: &a [x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)},' * 9}]\n" for i in range(9))
    yield Case("config-alias-bomb", _config_text(bomb), "anchors")
    yield Case("config-merge", _config_text("train: &t\n  seed: 1\ndata:\n  <<: *t"), "anchors")
    yield Case("config-two-documents", _config_text("train: {{}}\n---\nmodel: {{}}"), "not valid YAML")
    yield Case("config-list", _config_text("- !!python/name:os.system"), refused)
    yield Case("config-large", _config_text("#" * (2 << 20)), "larger than")
    yield Case("config-a-device", lambda *_: ["--config", "/dev/zero"], "larger than")
    for name, data in {
        **trees(),
        "latin-1": b"train: \xe9",
        "mark": b"\xef\xbb\xbfa: 1",
        "utf-16": b"\xff\xfea\0",
    }.items():
        if name not in ("nan", "twice", "digits"):
            yield Case(f"config-file-{name}", _config_bytes(data), r"\.yaml")
    for name in ("os.system", "torch.optim.AdamW", "posix:system", "builtins.eval", "../../evil", "evil.py:run"):
        for key in ("train.trainer", "train.optimizer.name", "train.lr_scheduler.name"):
            yield Case(f"name-{key}-{name.replace('/', '_')}", _words(f"{key}={name}"), "expected")
        yield Case(f"name-tracker-{name.replace('/', '_')}", _words(f"logging.report_to={name}"), "expected")
    for key in ("train.optimizer.class_path", "train.loss._target_", "train.optimizer.init_args", "model.auto_map",
                "model.trust_remote_code", "data.class_path", "train.optimizer.__class__"):  # fmt: skip
        yield Case(f"key-{key}", _words(f"{key}=os.system"), "unknown key|key.path=value|expected|is gone")


def _config_text(text: str) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, base: Base) -> list[object]:
        return _config_bytes(text.format(canary=base.canary).encode(errors="surrogatepass"))(folder, base)

    return make


def _config_bytes(data: bytes) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, _: Base) -> list[object]:
        (folder / "run.yaml").write_bytes(data)
        return ["--config", folder / "run.yaml"]

    return make


def _words(*words: object) -> Callable[[Path, Base], list[object]]:
    return lambda *_: list(words)


def adapters() -> Iterator[Case]:
    """Pickles and lying headers as the adapter to start from and as the one to export."""
    for kind in ("text", "framed", "torch", "npy", "npz"):
        for suffix in ("pt", "bin", "ckpt", "pth", "safetensors"):
            found = HEADER if (kind, suffix) == ("text", "safetensors") else CONVERT
            yield Case(f"adapter-{kind}-{suffix}", _adapter(kind, suffix), found)
    for kind in ("framed", "torch"):
        for suffix in ("pt", "safetensors"):
            yield Case(f"export-{kind}-{suffix}", _adapter(kind, suffix, export=True), CONVERT, [])
    for name, data in headers().items():
        yield Case(f"adapter-{name}", _file("a.safetensors", data, f"{LORA}={{}}"), HEADER)
    for name in ("length-huge", "deep", "overlap", "many-objects", "twice", "large"):
        made = _file("a.safetensors", headers()[name], "--export", "kohya", "--adapter", "{}")
        yield Case(f"export-{name}", made, HEADER, [])
    for name, text in {
        "deep": "[" * 100_000 + "]" * 100_000, "list": "[1]", "nan": '{"transformer.r": NaN}', "text": "x",
        "rank-text": '{"transformer.r": "os.system", "transformer.lora_alpha": 1}',
        "rank-zero": '{"transformer.r": 0, "transformer.lora_alpha": 1}',
    }.items():  # fmt: skip
        data = tensors({"__metadata__": {"lora_adapter_metadata": text}, "a": entry()})
        made = _file("a.safetensors", data, "--export", "kohya", "--adapter", "{}")
        yield Case(f"export-settings-{name}", made, "lora_adapter_metadata", [])


def _adapter(kind: str, suffix: str, export: bool = False) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, base: Base) -> list[object]:
        path = folder / f"adapter.{suffix}"
        path.write_bytes(pickles(base.canary)[kind])
        return ["--export", "kohya", "--adapter", path] if export else [f"{LORA}={path}"]

    return make


def _file(name: str, data: bytes, *words: str) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, _: Base) -> list[object]:
        (folder / name).write_bytes(data)
        return [word.replace("{}", str(folder / name)) for word in words]

    return make


WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors",
}  # fmt: skip


def models() -> Iterator[Case]:
    """A model's folder with pickles for weights, indexes that climb, lying headers, configs that fetch or fill."""
    for component, name in WEIGHTS.items():
        stem = name.removesuffix(".safetensors").replace("model", "pytorch_model") if "diff" not in name else name[:-12]
        for kind in ("framed", "torch"):
            made = _model({f"{component}/{name}": None}, {f"{component}/{stem}.bin": kind})
            yield Case(f"model-{component}-{kind}", made, CONVERT)
        made = _model({}, {f"{component}/{name}": "framed"})
        yield Case(f"model-{component}-misnamed", made, CONVERT)
        for inner in (
            ()
            if component in ("vae", "text_encoder")
            else (
                "../evil.safetensors",
                "/etc/hostname",
                "evil.bin",
                "a\\\\b.safetensors",
                "..",
                "",
                "sub/a.safetensors",
            )
        ):
            index = json.dumps({"metadata": {}, "weight_map": {"a": inner}}).encode()
            made = _model({f"{component}/{name}.index.json": index}, {f"{component}/evil.bin": "framed"})
            yield Case(
                f"index-{component}-{inner.strip('/').replace('/', '_')}", made, "expected safetensors files beside"
            )
        yield Case(
            f"adapter-beside-{component}", _model({f"{component}/adapter_config.json": b"{}"}), "would load another"
        )
    kinds = ("length-huge", "overlap", "gap", "deep", "many-objects", "twice", "negative-side", "overflow", "large")
    for name in kinds:
        for component in ("transformer", "text_encoder_2"):
            made = _model({f"{component}/{WEIGHTS[component]}": headers()[name]})
            yield Case(f"model-{component}-{name}", made, HEADER)
    for name, data in trees().items():
        for file in ("model_index.json", "text_encoder/config.json"):
            yield Case(f"json-{file.replace('/', '-')}-{name}", _model({file: data}), r"\.json")
        made = _model({f"transformer/{WEIGHTS['transformer']}.index.json": data})
        yield Case(f"index-transformer-{name}", made, r"index\.json")
    for name in ("deep", "pickle", "half", "list"):
        for file in ("tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer_config.json"):
            made = _model({file: trees()[name]}, cache=True)
            yield Case(f"{file.replace('/', '-')}-{name}", made, "tokenizer_2", ["--cache"])
    for name, changes, found in (
        ("kernel", {"attn_implementation": "evil/kernel"}, "code of others"),
        ("kernel-inside", {"text_config": {"_attn_implementation": "evil/kernel@main"}}, "code of others"),
        ("weights", {"transformers_weights": "../../evil.bin"}, "expected weights under their usual names"),
        ("layers", {"num_hidden_layers": 1 << 40}, "at most 1000 are built"),
    ):
        yield Case(f"settings-{name}", _settings("text_encoder", changes), found)
    yield Case("settings-many-layers", _settings("transformer", {"num_layers": 1_000_000}), "at most 1000 are built")


def _model(
    changes: dict[str, bytes | None], bad: dict[str, str] | None = None, cache: bool = False
) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, base: Base) -> list[object]:
        evil = {name: pickles(base.canary)[kind] for name, kind in (bad or {}).items()}
        model = linked(base.model, folder / "model", {**changes, **evil})
        return [f"{MODEL}={model}", *([f"cache.cache_dir={folder / 'cache'}"] if cache else [])]

    return make


def _settings(component: str, changes: dict[str, Any]) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, base: Base) -> list[object]:
        config = json.loads((base.model / component / "config.json").read_text())
        return _model({f"{component}/config.json": json.dumps({**config, **changes}).encode()})(folder, base)

    return make


def tables() -> Iterator[Case]:
    """Rows of CSV and JSONL tables that leave their folder, and archives and hub folders that do."""
    outside = "expected a path inside|link out of the data set|found no file"
    names = {
        "up": "../private.png", "up-inside": "x/../../private.png", "dots": "./.././private.png",
        "absolute": "{root}/private.png",
        "host": "/etc/hostname", "link": "link.png", "linked-folder": "linked/private.png", "home": "~/private.png",
        "url": "https://example.invalid/a.png", "file-url": "file:///etc/hostname", "percent": "%2e%2e/private.png",
        "backslash": "..\\private.png", "long": "a" * 5000, "device": "/dev/zero", "process": "/proc/self/environ",
    }  # fmt: skip
    for name, target in names.items():
        for column in ("path_target", "path_control", "path_mask"):
            if column == "path_target" or name in ("up", "absolute", "link"):
                yield Case(f"csv-{column}-{name}", _table(column, target, "csv"), outside)
        yield Case(f"jsonl-{name}", _table("path_target", target, "jsonl"), outside)
    for name, cell in {"list": ["a.png", "../private.png"], "object": {"path": "a.png"}, "zero": "a\0.png", "number": 5,
                       "half": "\ud800.png", "true": True}.items():  # fmt: skip
        yield Case(f"jsonl-cell-{name}", _table("path_control", cell, "jsonl"), "expected|found no file")
    for name, data in trees().items():
        yield Case(f"jsonl-line-{name}", _file("t.jsonl", data, f"{DATA}={{}}"), r"t\.jsonl|expected")
    yield Case(
        "jsonl-endless-line", _file("t.jsonl", b'{"a": "' + b"x" * (40 << 20), f"{DATA}={{}}"), "found a line of more"
    )
    yield Case(
        "csv-endless-cell", _file("t.csv", b'path_target\n"' + b"x\n" * (5 << 20), f"{DATA}={{}}"), "cannot be read"
    )
    yield Case("data-zip", _kind("torch", "set.zip"), "expected a folder")
    yield Case("data-pickle", _kind("framed", "set.pkl"), "expected a folder")
    yield Case("data-npy", _kind("npy", "images/a.npy"), "found no pictures")
    yield Case("picture-pickle", _kind("framed", "images/a.png"), "found no picture")
    yield Case("caption-pickle", _kind("framed", "images/a.txt"), "found no pictures")


def _kind(kind: str, name: str) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, base: Base) -> list[object]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pickles(base.canary)[kind])
        return [f"{DATA}={folder / name if '/' not in name else folder}"]

    return make


def _table(column: str, cell: Any, suffix: str) -> Callable[[Path, Base], list[object]]:
    def make(folder: Path, _: Base) -> list[object]:
        (folder / "private.png").write_bytes(encoded(scene()))
        inner = folder / "set"
        inner.mkdir()
        (inner / "a.png").write_bytes(encoded(scene()))
        (inner / "link.png").symlink_to("../private.png")
        (inner / "linked").symlink_to("..")
        value = cell.replace("{root}", str(folder)) if isinstance(cell, str) else cell
        row = {"path_target": "a.png", "path_control": "", "path_mask": "", "prompt": "x", column: value}
        table = inner / f"t.{suffix}"
        if suffix == "jsonl":
            table.write_text(json.dumps(row) + "\n")
        else:
            table.write_text(f"{','.join(row)}\n{','.join(str(item) for item in row.values())}\n")
        return [f"{DATA}={table}"]

    return make
