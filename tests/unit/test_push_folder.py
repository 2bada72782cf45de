"""The folder that is shared: what may lie in it already."""

import json

import pytest

from qflux.errors import UserError
from qflux.tools import push


def test_what_an_earlier_push_left_is_replaced(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    stale, outside = folder / "weights_comfyui.safetensors", tmp_path / "run.json"
    stale.write_bytes(b"of an earlier step")
    outside.write_text("{}")
    with pytest.raises(UserError, match="holds files that are not of this push: weights_comfyui"):
        push._refuse_others(folder, ["README.md"])
    (folder / push.WRITTEN).write_text(json.dumps(["README.md", stale.name, "../run.json"]))
    push._refuse_others(folder, ["README.md"])
    assert not stale.exists()
    assert outside.exists(), "names that lead elsewhere are not followed"


def test_hidden_files_are_somebodys_too(tmp_path):
    (tmp_path / ".netrc").write_text("an upload by hand would take it along")
    with pytest.raises(UserError, match=r"holds files that are not of this push: \.netrc"):
        push._refuse_others(tmp_path, ["README.md"])


@pytest.mark.parametrize("note", [b'["mine.txt"', b"\xff", b'{"mine.txt": 1}', b'["mine.txt", 3]', b"[" * 100_000])
def test_an_altered_note_is_one_line_and_deletes_nothing(tmp_path, note):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / push.WRITTEN).write_bytes(note)
    with pytest.raises(UserError, match=rf"--out: .*{push.WRITTEN}.*move it away"):
        push._refuse_others(tmp_path, ["README.md"])
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "pytorch_lora_weights.safetensors", "samples/sheet.png"])
def test_a_file_that_no_push_has_noted_is_never_replaced(tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"holds files that are not of this push: {name}"):
        push._refuse_others(tmp_path, ["README.md", "pytorch_lora_weights.safetensors", "samples/sheet.png"])
    assert mine.read_text() == "mine"
    (tmp_path / push.WRITTEN).write_text(json.dumps([name]))
    push._refuse_others(tmp_path, ["README.md", "pytorch_lora_weights.safetensors", "samples/sheet.png"])
    assert mine.read_text() == "mine", "it is the push that replaces it"
