"""What is written into fuzzed configs: odd texts and what they mean, texts no config may hold, keys nobody knows."""

from __future__ import annotations

import math
import re
from typing import Any

PICTURE = "here.png"
# YAML takes no such characters, or takes them for the end of a line.
UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]|\\\\u[0d]")

Written = tuple[str, Any]  # a YAML text and what it means by the core schema of YAML 1.2


class REFUSED:
    """Stands for a value that no config may hold; a class, because copies of it are itself."""


WORDS: list[Written] = [
    ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-0", 0), ("+3", 3), ("0o17", 15), ("017", 17),
    ("0x1F", 31), ("1_000", "1_000"), ("0b1", "0b1"), ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"),
    ("y", "y"), ("True", True), ("FALSE", False), ("tRuE", "tRuE"), ("~", None), ("Null", None), ("", None),
    (".nan", math.nan), (".inf", math.inf), ("-.INF", -math.inf), ("1e999", math.inf), ("-1e999", -math.inf),
    ("nan", "nan"), ("2026-01-01", "2026-01-01"), ("2026-01-01T10:00:00Z", "2026-01-01T10:00:00Z"),
    ("12:30:45", "12:30:45"), ("=", "="), ("<<", "<<"), ("-1", -1), ("0", 0), ("1", 1), ("1.0", 1.0), ("-1.5", -1.5),
    ("9" * 39, int("9" * 39)), ("9" * 60, "9" * 60), (str(2**32), 2**32), (str(2**64), 2**64), ("1e308", 1e308),
    ("5e-324", 5e-324), ("'1'", "1"), ('"true"', "true"), ("''", ""), ("' '", " "), ("[]", []), ("{}", {}),
    ("[[]]", [[]]), ("[null]", [None]), ("[1, 2, 3]", [1, 2, 3]), ("[yes, 1e2]", ["yes", 100.0]),
    ("{a: 1}", {"a": 1}), ("{path: }", {"path": None}), ("[[1, 2], [3]]", [[1, 2], [3]]),
    ("{a: {b: [{c: 1}]}}", {"a": {"b": [{"c": 1}]}}), ("[{}]", [{}]), ("é", "é"), ("日本語", "日本語"), ("🙂", "🙂"),
    ('"a\\nb"', "a\nb"), ("x" * 300, "x" * 300), ("../../etc", "../../etc"), ("d%0$HOME`id`", "d%0$HOME`id`"),
]  # fmt: skip
FORBIDDEN = [
    "!!python/object/apply:os.system [x]", "!x 1", "&a 1", "*a", "!!int '3'", '"\\u0000"', '"\\ud800"',
    "hf_" + "x" * 30, "[1, 2", "{", "'", '"', "@a", "[" * 30 + "]" * 30, '"\\q"', "a: b: c", "{a: 1, a: 2}",
    "{[1]: 2}", '"\\U00110000"', "[1, 2] 3", "x\x07y", "? [", "|x",
]  # fmt: skip
UNKNOWN = [
    "foo", "<<", "=", "", "null", "1", "yes", " ", "a b", "ключ", "🙂", "?", "a\nb", "k" * 200, "model.lora",
    "__class__", "_fill_empty", "model_config", "model_fields", "self", "MODEL", "Seed", "batch-size", "[0]", "#",
    "rank", "lr ",
]  # fmt: skip
MALFORMED = [
    "seed", "=1", "train..seed=1", ".seed=1", "train.seed.=1", "data.dataset_path[0]=x", "train seed=1", "--x=1",
    "a/b=1",
]  # fmt: skip
SPECIAL: dict[str, list[Written]] = {
    "train.memory_limit": [("24GB", "24GB"), ("24", 24), ("none", "none"), ("23.5 GiB", "23.5 GiB")],
    "logging.report_to": [("none", "none"), ("wandb", "wandb"), ("[wandb, tensorboard]", ["wandb", "tensorboard"])],
    "data.multi_resolutions": [('[512, "768*512", [832, 576]]', [512, "768*512", [832, 576]])],
    "model.quantize_text_encoders": [("{t5: bnb-nf4}", {"t5": "bnb-nf4"}), ("{a: true}", {"a": True})],
    "model.pretrained_model_name_or_path": [("owner/name", "owner/name"), ("./here", "./here"), (".", ".")],
    "logging.validation.samples.controls": [(f"[{PICTURE}]", [PICTURE])],
    "logging.validation.samples.target": [(PICTURE, PICTURE)],
    "logging.validation.samples.mask": [(PICTURE, PICTURE)],
    "model.lora.pretrained_weight": [("null", None)],
}
