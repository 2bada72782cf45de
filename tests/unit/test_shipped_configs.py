from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest

from qflux.config import config_schema, dump_config, load_config
from qflux.config_yaml import parse

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_configs_are_shipped():
    assert {"demo_flux_kontext.yaml", "face_seg_flux_kontext_fp16.yaml"} <= {file.name for file in FILES}


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
