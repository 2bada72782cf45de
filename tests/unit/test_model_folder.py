"""What is refused of a model's folder from names of files and JSON alone."""

from __future__ import annotations

import json

import pytest

from qflux.io.json_files import SIZE_LIMIT
from qflux.models.model_folder import folder_problems


@pytest.mark.parametrize("size", [0, SIZE_LIMIT], ids=["small", "large"])
def test_a_tokenizer_that_was_cut_short_is_a_problem(tmp_path, size):
    """Of a file that is larger than the strict reader takes only the end is looked at."""
    component = tmp_path / "model" / "tokenizer_2"
    component.mkdir(parents=True)
    whole = json.dumps({"version": "1.0", "pad": "x" * size, "model": {"vocab": {"a": 0, "b": 1}}}) + "\n"
    file = component / "tokenizer.json"
    file.write_text(whole)
    assert folder_problems(tmp_path / "model", ["tokenizer_2"]) == []
    for kept in (len(whole) - 4, len(whole) // 2, 0):
        file.write_text(whole[:kept] if size == 0 else whole[: max(kept, size + 1)])
        (line,) = folder_problems(tmp_path / "model", ["tokenizer_2"])
        assert line.startswith(f"model.pretrained_model_name_or_path: {file} cannot be read: ")
        assert line.endswith("; fetch it again")
