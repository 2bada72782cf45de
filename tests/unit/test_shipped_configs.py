from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest

from qflux.config import config_schema, dump_config, load_config
from qflux.config_yaml import parse
from qflux.data.geometry import size_problems, text_problems
from qflux.main import import_trainer

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


SHIPPED = {
    "demo_flux_kontext": "FluxKontext",
    "face_seg_config": "QwenImageEdit",
    "face_seg_flux_kontext_fp16": "FluxKontext",
    "flux2_dev_edit": "Flux2",
    "flux2_klein_4b": "Flux2Klein",
    "flux_dev_t2i": "Flux",
    "qwen_image_edit_plus_2509": "QwenImageEditPlus",
    "qwen_image_edit_plus_pose": "QwenImageEditPlus",
    "qwen_image_t2i": "QwenImage",
}


def test_configs_are_shipped():
    assert {file.stem for file in FILES} == SHIPPED.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_fits_its_family(file):
    config = load_config(file)
    assert config.train.trainer == SHIPPED[file.stem]
    family = import_trainer(config).family
    assert size_problems(config.data, family) + text_problems(config.data, family) == []
    assert config.data.control_plan == "config" or family.control_size is not None
    assert config.model.lora is not None
    assert config.model.lora.target_modules in {"all-linear", *family.adapter_targets}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_loads_and_has_no_path_of_a_machine(file, tmp_path):
    config = load_config(file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../docs/schemas/config.schema.json\n")
    assert not re.search(r"""(?m)(?:^|[\s\[{,:"'])[/~]\w|cuda:""", text)
    jsonschema.validate(parse(text).value, config_schema())
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
