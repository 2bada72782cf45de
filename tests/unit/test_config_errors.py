from __future__ import annotations

import random

import pytest

from qflux.config import load_config
from qflux.config_errors import all_keys, allowed_keys, edit_distance, nearest
from qflux.config_yaml import key_text, parse, write_yaml
from qflux.errors import UserError

MINIMAL = """\
model: {pretrained_model_name_or_path: owner/name}
data: {dataset_path: pairs}
train: {trainer: Any}
"""


def with_key(key: str, value: object) -> str:
    """The minimal file plus one key."""
    tree = parse(MINIMAL).value
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return write_yaml(tree)


def typos(word: str, count: int, chance: random.Random) -> set[str]:
    """One-edit neighbours of a word: a letter dropped, doubled, replaced, or two swapped."""
    letters = "abcdefghijklmnopqrstuvwxyz_"
    found: set[str] = set()
    for _ in range(count):
        at = chance.randrange(len(word))
        kind = chance.randrange(4)
        if kind == 0 and len(word) > 1:
            found.add(word[:at] + word[at + 1 :])
        elif kind == 1:
            found.add(word[:at] + chance.choice(letters) + word[at:])
        elif kind == 2 and at + 1 < len(word):
            found.add(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
        else:
            found.add(word[:at] + chance.choice(letters) + word[at + 1 :])
    return found - {word}


def test_one_edit_typos_get_the_right_key(tmp_path):
    """95 % of a few hundred typos, five at most for each key of the schema, through the whole reader."""
    chance = random.Random(20)
    right, wrong = 0, []
    file = tmp_path / "typo.yaml"
    for key in all_keys():
        parent = key_text(key[:-1])
        for typo in sorted(typos(str(key[-1]), 5, chance)):
            if typo in allowed_keys(key[:-1]):
                continue
            listed = parent.endswith(("samples", "dataset_path", "held_out"))
            section = {"path": "x"} if parent.endswith(("dataset_path", "held_out")) else {"prompt": "x"}
            text = with_key(parent, [{**section, typo: 1}]) if listed else with_key(key_text((*key[:-1], typo)), 1)
            file.write_text(text)
            with pytest.raises(UserError) as caught:
                load_config(file)
            expected = f"did you mean {parent}{'[0]' if listed else ''}{'.' if parent else ''}{key[-1]}?"
            if expected in str(caught.value):
                right += 1
            else:
                wrong.append((key_text(key), typo))
    assert right + len(wrong) > 300
    assert right / (right + len(wrong)) >= 0.95, wrong


def test_edit_distance_counts_single_edits():
    assert [edit_distance("batch", word) for word in ("batch", "btach", "batc", "bxtch", "batchh", "abc")] == [
        *(0, 1, 1, 1, 1, 3),
    ]
    assert nearest("zzzzzz", ["seed", "loss"]) is None
