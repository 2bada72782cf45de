from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qflux.config import Config, config_schema, dump_config, load_config
from qflux.config_errors import all_keys
from qflux.config_yaml import key_text, parse, write_yaml
from qflux.errors import UserError

ROOT = Path(__file__).parents[2]
MINIMAL = """\
model: {pretrained_model_name_or_path: owner/name}
data: {dataset_path: pairs}
train: {trainer: Any}
"""


@pytest.fixture
def load(tmp_path):
    def from_text(text: str, *overrides: str) -> Config:
        file = tmp_path / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(file, overrides)

    return from_text


@pytest.fixture
def problems(load):
    def of_text(text: str, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        found = caught.value.problems
        assert all("\n" not in line for line in found)
        return found

    return of_text


def with_key(key: str, value: object) -> str:
    """The minimal file plus one key."""
    tree = parse(MINIMAL).value
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return write_yaml(tree)


def test_three_keys_make_a_complete_config(load, tmp_path):
    config = load(MINIMAL)
    assert config.model.pretrained_model_name_or_path == "owner/name"
    assert config.model.lora.lora_alpha == config.model.lora.r == 16
    assert [str(entry.path) for entry in config.data.dataset_path] == [str(tmp_path / "pairs")]
    assert config.logging.output_dir == tmp_path / "runs"
    assert config.cache.cache_dir == tmp_path / "runs" / "cache"
    assert config.logging.validation.guidance_scale == config.train.guidance_scale == 1.0
    assert config.logging.report_to == ("tensorboard",)
    with pytest.raises(Exception, match="frozen"):
        config.train.seed = 1


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("model.lora", None, None),
        ("data.controls_size", [64, 32], ((64, 32),)),
        ("data.controls_size", [[64, 32], [32, 32]], ((64, 32), (32, 32))),
        ("data.target_size", [64, 32], (64, 32)),
        ("data.multi_resolutions", [512, "768*512", [64, 32]], (512, "768*512", (64, 32))),
        ("train.gradient_checkpointing", True, "full"),
        ("train.gradient_checkpointing", False, "none"),
        ("train.mixed_precision", "no", "no"),
        ("train.sigma.shift", "auto", "auto"),
        ("train.sigma.shift", 3, 3.0),
        ("logging.report_to", "none", ()),
        ("logging.report_to", ["wandb", "tensorboard"], ("wandb", "tensorboard")),
        ("model.lora.target_modules", ["to_q", "to_k"], ("to_q", "to_k")),
        ("model.lora.lora_alpha", 32, 32),
        ("model.quantize", None, False),
        ("train.max_skipped_steps", 0, 0),
        ("logging.validation.guidance_scale", 0, 0.0),
    ],
)
def test_values_are_normalised_and_survive_dump_and_load(load, tmp_path, key, value, read):
    config = load(with_key(key, value))
    node = config
    for part in key.split("."):
        node = getattr(node, part)
    assert node == read
    (tmp_path / "other").mkdir()
    again = tmp_path / "other" / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_dataset_path_takes_paths_entries_and_lists(load, tmp_path):
    entries = [{"repo_id": "a/b", "repeats": 3}, "/data/x.csv", {"path": "y", "control_path": ["c"], "mask_path": "m"}]
    hub, csv, local = load(with_key("data.dataset_path", entries)).data.dataset_path
    assert (hub.repo_id, hub.split, hub.repeats, hub.path) == ("a/b", "train", 3, None)
    assert csv.path == Path("/data/x.csv")
    assert local.path == tmp_path / "y"
    assert local.control_path == (tmp_path / "c",)
    assert local.mask_path == tmp_path / "m"
    assert load(with_key("data.dataset_path", {"repo_id": "a/b"})).data.dataset_path[0].repo_id == "a/b"


def test_relative_paths_follow_who_wrote_them(load, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    config = load(MINIMAL.replace("owner/name", "weights"), "data.mask_path=masks", "logging.output_dir=../out")
    assert config.model.pretrained_model_name_or_path == str(tmp_path / "weights")
    assert config.data.mask_path == tmp_path / "cwd" / "masks"
    assert config.logging.output_dir == tmp_path / "out"
    assert load(MINIMAL.replace("owner/name", "./none")).model.pretrained_model_name_or_path == str(tmp_path / "none")


def test_numbers_and_words_are_read_as_yaml_1_2_does():
    text = "[1e-4, 1.5E+3, .5, 0x10, 0o10, yes, off, No, True, null, ~, 1_000, 2020-01-01, 12:30, -.inf]"
    assert parse(text).value == [
        *(1e-4, 1500.0, 0.5, 16, 8, "yes", "off", "No", True, None, None),
        *("1_000", "2020-01-01", "12:30", float("-inf")),
    ]
    words = ["no", "1e-4", "true", "null", "", "0x1", "a: b", "# c", "é", "1:30", "~", "- x", " y "]
    assert parse(write_yaml(words)).value == words


def test_all_problems_come_at_once_with_line_key_value_and_advice(problems, tmp_path):
    text = (
        "model:\n  pretrained_model_name_or_path: owner/name\n  quantize: nf4\n"
        "data:\n  dataset_path: x\n  batch_sise: 3\n"
        "train:\n  trainer: Any\n  seed: yes\n  optimizer: {lr: fast, name: adam8bit}\n"
        "logging:\n  validation:\n    samples:\n      - {prompt: a, controls: [one.png, two.png]}\n"
    )
    name = tmp_path / "run.yaml"
    found = problems(text, "data.target_size=[64", "train.sed=1", "model.lora.r=0", "oops")
    starts = [
        f'{name}:3: model.quantize: found "nf4", expected false, true (quanto-fp8) or one of bnb-nf4, bnb-fp4,',
        f"{name}:6: data.batch_sise: unknown key; did you mean data.batch_size? (data allows: dataset_path,",
        f'{name}:9: train.seed: found "yes", expected a whole number',
        f'{name}:10: train.optimizer.lr: found "fast", expected a number above 0; the default is 0.0001',
        f'{name}:10: train.optimizer.name: found "adam8bit", expected adamw, adamw8bit, prodigy, adafactor or',
        f"{name}:14: logging.validation.samples[0].controls[0]: no such file: {str(tmp_path / 'one.png')!r}",
        f"{name}:14: logging.validation.samples[0].controls[1]: no such file: {str(tmp_path / 'two.png')!r}",
        "command line: 'data.target_size=[64': not valid YAML",
        "command line: train.sed: unknown key; did you mean train.seed?",
        "command line: model.lora.r: found 0, expected a whole number at least 1; the default is 16",
        "command line: found 'oops', expected key.path=value",
    ]
    for start in starts:
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == len(starts)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.loss.huber_delta", 0, "above 0"),
        ("train.max_train_steps", 0, "at least 1"),
        ("train.max_train_steps", 10.0, "a whole number"),
        ("train.max_train_steps", "10", "a whole number"),
        ("train.max_train_steps", True, "a whole number"),
        ("train.optimizer.betas", [0.9, 1.0], "below 1"),
        ("train.optimizer.betas", [0.9], "a list of 2"),
        ("train.optimizer.lr", float("nan"), "above 0"),
        ("train.lr_scheduler", {"name": "linear", "warmup_steps": 1001}, "at most train.max_train_steps = 1000"),
        ("train.lr_scheduler", {"warmup_steps": 1}, "constant_with_warmup"),
        ("train.lr_scheduler", {"name": "cosine_with_restarts", "num_cycles": 0.5}, "whole number of cycles"),
        ("train.max_skipped_steps", -1, "a whole number at least 0"),
        ("logging.validation.guidance_scale", -1, "a number at least 0"),
        ("logging.validation.guidance_scale", float("nan"), "a number at least 0"),
        ("logging.validation.guidance_scale", "3.5", "a number at least 0"),
        ("model.quantize", 0, "expected false, true (quanto-fp8) or one of"),
        ("model.quantize", "bnb_nf5", "did you mean bnb-nf4?"),
        ("model.quantize_text_encoders", {"t5": 0}, "expected false, true (quanto-fp8) or one of"),
        ("train.sigma.shift", "atuo", "did you mean auto?"),
        ("model.lora.lora_alpha", True, "a whole number at least 1"),
        ("model.lora.lora_alpha", "8", "a whole number at least 1"),
        ("data.dataset_path", "", "expected a path"),
        ("data.mask_path", "", "expected a path"),
        ("logging.output_dir", "", "expected a path"),
        ("cache.cache_dir", "", "expected a path"),
        ("train.sigma.shift", 0, '"none", "auto" or a number above 0'),
        ("train.gradient_checkpointing", "yes", "true or false or none, ffn, alternate, full or selective"),
        ("data.target_size", [64, 64, 64], "[height, width]"),
        ("data.target_size", "64", "[height, width]"),
        ("data.controls_size", [], "[height, width]"),
        ("data.multi_resolutions", ["64"], '"a*b"'),
        ("data.caption_dropout_rate", 1.5, "at most 1"),
        ("data.background_color", [1, 2, 256], "0 to 255"),
        ("data.dataset_path", {"path": "x", "repo_id": "y/z"}, "exactly one of path and repo_id"),
        ("data.dataset_path", [], "a path, an entry"),
        ("data.dataset_path", 3, "a path, an entry"),
        ("logging.tracker_project_name", "a/b", "plain folder name"),
        ("logging.tracker_project_name", "..", "plain folder name"),
        ("logging.report_to", ["tb"], "tensorboard, wandb, swanlab, trackio"),
        ("model.pretrained_model_name_or_path", "a/b/c", "a hub id (OWNER/NAME) or a folder"),
        ("model.lora.target_modules", [], "a named list"),
        ("model.lora.pretrained_weight", "none.safetensors", "no such file"),
        ("model.revision", "hf_" + "a" * 34, "looks like an access token"),
        ("logging.validation.samples", [{"controls": []}], "samples[0].prompt: missing"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_key_and_expectation(problems, key, value, said):
    (line,) = problems(with_key(key, value))
    assert said in line
    assert ":" in line.partition("run.yaml:")[2]
    assert key.split(".")[-1] in line or said == "looks like an access token"
    assert "hf_aaa" not in line


def test_two_size_rules_exclude_each_other(problems):
    (line,) = problems(with_key("data.multi_resolutions", [512]), "data.target_size=[64,64]")
    assert "data.multi_resolutions" in line
    assert "excludes data.target_size" in line
    (line,) = problems(with_key("data.controls_size", [64, 64]), "data.control_plan=pipeline")
    assert "data.control_plan" in line
    assert "excludes data.controls_size" in line


def test_missing_keys_are_named_with_what_to_write(problems):
    found = problems("model:\ndata: {}\n")
    assert len(found) == 3
    for key in ("pretrained_model_name_or_path", "dataset_path", "trainer"):
        assert any(f"{key}: missing; write `{key}: ...`" in line for line in found)


def test_a_misspelt_required_key_is_reported_once(problems):
    (line,) = problems(MINIMAL.replace("dataset_path", "dataset_pth"))
    assert "did you mean data.dataset_path?" in line


def test_a_key_in_the_wrong_section_is_found(problems):
    assert "did you mean train.optimizer.lr?" in problems(with_key("train.lr", 1e-4))[0]
    assert "did you mean data.batch_size?" in problems(with_key("train.batch_size", 2))[0]


def test_an_adapter_left_empty_is_not_taken_for_full_training(problems, load):
    text = MINIMAL.replace("owner/name}", "owner/name, lora: }")
    assert "model.lora: found nothing; write {}" in problems(text)[0]
    assert load(text, "model.lora=null").model.lora is None
    assert load(text.replace("lora: ", "lora: {}")).model.lora.r == 16
    assert load(MINIMAL + "logging:\n  validation:\ncache:\n").cache.use_cache


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- a\n", ":1: expected sections"),
        ("model: [\n", "not valid YAML"),
        ("model: {a: 1\ntrain: x", "not valid YAML"),
        ("\tmodel: x", ":1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML"),
        ("a: &x 1\n", ":1: anchors"),
        ("b: 1\na: *x\n", ":2: anchors"),
        ("a: !!python/name:os.system x\n", ":1: tags"),
        ("a: ! x\n", ":1: tags"),
        ("[" * 500, "nested more than"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("a: \x01\n", "U+0001"),
        (b"\xef\xbb\xbfmodel: 1", "byte order mark"),
        ("é: 1".encode("latin-1"), ":1: byte 0xe9 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(problems, text, said):
    (line,) = problems(text)
    assert said in line


def test_files_that_are_not_there(tmp_path):
    for name in ("none.yaml", ".", "\0"):
        with pytest.raises(UserError, match="give the path of a YAML config"):
            load_config(tmp_path / name)


def test_duplicate_keys_are_refused_with_both_lines(problems):
    found = problems(MINIMAL + "cache:\n  use_cache: true\n  use_cache: false\n")
    assert found[0].endswith("run.yaml:6: cache.use_cache: written twice, first in line 5; keep one")


def test_overrides_are_typed_and_the_last_one_wins(load, tmp_path):
    config = load(
        MINIMAL,
        *("model.lora=null", "model.lora.r=8", "data.target_size=[64,32]", "train.optimizer={lr: 1e-3, name: prodigy}"),
        *("train.seed=1", "train.seed=2", "data.trigger_word=on", "data.dataset_path=[{repo_id: a/b}]", "train.ema={}"),
    )
    assert config.model.lora.lora_alpha == 8
    assert config.data.target_size == (64, 32)
    assert (config.train.optimizer.lr, config.train.optimizer.name) == (1e-3, "prodigy")
    assert (config.train.seed, config.data.trigger_word) == (2, "on")
    assert config.train.ema.decay == 0.999


def test_an_override_below_a_value_says_so(problems):
    (line,) = problems(MINIMAL, "train.trainer.name=x")
    assert line.startswith("command line: train.trainer.name: train.trainer is no mapping")


def test_schema_file_is_the_schema_and_every_property_is_described():
    schema = config_schema()
    assert json.loads((ROOT / "docs/schemas/config.schema.json").read_text()) == schema
    models = {"Config": schema, **schema["$defs"]}
    assert {"Config", "LoraConfig", "DatasetEntry", "ValidationSample"} <= set(models)
    bare = [
        f"{name}.{key}"
        for name, model in models.items()
        for key, prop in model["properties"].items()
        if not prop.get("description")
    ]
    assert bare == []
    assert all(model["additionalProperties"] is False for model in models.values())


def test_the_schema_module_is_quick_and_loads_no_tensor_library():
    code = (
        "import sys, qflux.config_file; assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    command = [sys.executable, "-W", "error", "-m", "qflux.config", "--schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs/schemas/config.schema.json").read_text()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("hf_" + "x" * 30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "r", "name", "a"]), inner),
    max_leaves=5,
)
KEYS = st.sampled_from([key_text(key) for key in all_keys()])
TEXTS = st.one_of(
    st.text(max_size=60),
    st.tuples(KEYS, VALUES).map(lambda pair: with_key_or_text(*pair)),
    st.tuples(st.integers(0, len(MINIMAL)), st.text(max_size=5)).map(
        lambda cut: MINIMAL[: cut[0]] + cut[1] + MINIMAL[cut[0] :]
    ),
)


def with_key_or_text(key: str, value: object) -> str:
    try:
        return with_key(key, value)
    except (AttributeError, TypeError):
        return f"{key}: {value!r}"


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TEXTS, st.lists(st.one_of(st.text(max_size=20), st.builds("{}={}".format, KEYS, VALUES)), max_size=2))
def test_no_input_gives_anything_but_a_config_or_a_user_error(tmp_path, text, overrides):
    file = tmp_path / "fuzz.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    config, problems = None, ["none"]
    try:
        config = load_config(file, overrides)
    except UserError as error:
        problems = error.problems
    assert problems
    assert all("\n" not in line for line in problems)
    assert "hf_xxx" not in "".join(problems)
    if config is not None:
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(config), encoding="utf-8")
        assert load_config(again) == config
