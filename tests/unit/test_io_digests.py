"""Digests, and the memo of them: it is believed only where nothing has changed, and where it is whole."""

import json
import os
import time
from pathlib import Path

import pytest

from qflux.io import digests


def test_digests_agree_with_the_libraries(tmp_path):
    import blake3
    import xxhash

    path = tmp_path / "x"
    path.write_bytes(b"abc" * 1_000_000)
    assert digests.xxh3(path) == digests.xxh3(str(path)) == xxhash.xxh3_128(path.read_bytes()).hexdigest()
    assert digests.xxh3(b"abc") == xxhash.xxh3_128(b"abc").hexdigest()
    assert digests.blake3_file(path) == blake3.blake3(path.read_bytes()).hexdigest()


def test_json_digest_ignores_order_only():
    assert digests.blake3_json({"a": 1, "b": (1, 2)}) == digests.blake3_json({"b": [1, 2], "a": 1})
    values = [
        {"a": 1},
        {"a": 1.0},
        {"a": "1"},
        {"a": None},
        {"a": True},
        {"b": 1},
        [["a", 1]],
        {"a": [1]},
        "\u00e9",
        "e\u0301",
    ]
    assert len({digests.blake3_json(value) for value in values}) == len(values)
    assert digests.blake3_json({"b", "a"}) == digests.blake3_json(["a", "b"])
    with pytest.raises(ValueError, match="JSON compliant"):
        digests.blake3_json(float("inf"))
    with pytest.raises(TypeError, match="PosixPath"):
        digests.blake3_json(Path("/x"))


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once."""
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)


def noted(memo_path, *paths):
    """A memo of files, saved; the digests."""
    memo = digests.DigestMemo(memo_path)
    found = [digests.blake3_file(path, memo) for path in paths]
    memo.save()
    return found


def test_memo_is_used_until_the_file_changes(tmp_path, settled, monkeypatch):
    path, memo_path = tmp_path / "x", tmp_path / "memo.json"
    path.write_bytes(b"one")
    old = time.time() - 100
    os.utime(path, (old, old))
    (digest,) = noted(memo_path, path)
    assert digests.DigestMemo(memo_path).get(path) == digest
    os.utime(path, (old + 1, old + 1))
    memo = digests.DigestMemo(memo_path)
    assert memo.get(path) is None
    monkeypatch.undo()
    for data, mtime in ((b"two", time.time()), (b"six", old)):  # just changed: may change again within a clock's tick
        path.write_bytes(data)
        os.utime(path, (mtime, mtime))
        assert digests.blake3_file(path, memo) != digest
        assert memo.get(path) is None


def test_a_memo_knows_a_file_whose_old_time_was_put_back(tmp_path, settled):
    path, memo_path = tmp_path / "x", tmp_path / "memo.json"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    (digest,) = noted(memo_path, path)
    before = path.stat()
    time.sleep(0.02)  # more than a tick
    path.write_bytes(b"two")  # as ``cp -p`` writes: into the same file
    os.utime(path, ns=(10**18, 10**18))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    assert digests.DigestMemo(memo_path).get(path) is None
    assert noted(memo_path, path) != [digest]


def resealed(change):
    """A change of the rows that the memo's checksum does not tell."""

    def act(text):
        found = json.loads(text)
        change(found["files"])
        found["digest"] = digests.xxh3(json.dumps(found["files"], sort_keys=True).encode())
        return json.dumps(found)

    return act


def first_row(rows):
    return rows[min(rows)]


def one_digit(text):
    """Another last digit in the last row."""
    last = text.rindex('"', 0, text.rindex("]")) - 1
    return text[:last] + ("0" if text[last] != "0" else "1") + text[last + 1 :]


BAD_MEMOS = {
    "no json": lambda text: "not json",
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "deep": lambda text: "[" * 100_000,
    "a list": lambda text: "[]",
    "no digest": lambda text: json.dumps({"files": json.loads(text)["files"]}),
    "one digit": one_digit,
    "one name": lambda text: text.replace('/b"', '/c"'),
    "another size": lambda text: text.replace("      3,\n", "      4,\n", 1),
    "older": lambda text: json.dumps({name: [*row[:2], *row[3:]] for name, row in json.loads(text)["files"].items()}),
    "older row": resealed(lambda rows: first_row(rows).pop(2)),
    "short digest": resealed(lambda rows: first_row(rows).append(first_row(rows).pop()[1:])),
    "no digits": resealed(lambda rows: first_row(rows).append(first_row(rows).pop().replace("0", "g"))),
    "no digest's row": resealed(lambda rows: first_row(rows).append(first_row(rows).pop() and 5)),
    "no stamp": resealed(lambda rows: first_row(rows).insert(0, str(first_row(rows).pop(0)))),
    "no row": resealed(lambda rows: rows.update(more={})),
}


@pytest.mark.parametrize("name", BAD_MEMOS)
def test_a_damaged_memo_is_an_empty_one(tmp_path, settled, name):
    paths, memo_path = [tmp_path / "a", tmp_path / "b"], tmp_path / "memo.json"
    for path in paths:
        path.write_bytes(path.name.encode() * 3)
    good = noted(memo_path, *paths)
    text = memo_path.read_text()
    assert all(digests.DigestMemo(memo_path).get(path) for path in paths)
    memo_path.write_text(BAD_MEMOS[name](text))
    assert memo_path.read_text() != text
    memo = digests.DigestMemo(memo_path)
    assert [memo.get(path) for path in paths] == [None, None]
    assert noted(memo_path, *paths) == good
    assert memo_path.read_text() == text


def test_a_pipe_in_a_memos_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "memo.json")
    assert digests.DigestMemo(tmp_path / "memo.json").get(tmp_path) is None


def test_memos_of_two_processes_are_merged(tmp_path, settled):
    paths = [tmp_path / "a", tmp_path / "b"]
    memos = [digests.DigestMemo(tmp_path / "memo.json") for _ in paths]
    for path, memo in zip(paths, memos, strict=True):
        path.write_bytes(path.name.encode())
        os.utime(path, (1e9, 1e9))
        digests.blake3_file(path, memo)
        memo.save()
    merged = digests.DigestMemo(tmp_path / "memo.json")
    assert all(merged.get(path) for path in paths)


def test_what_a_memo_forgets_no_other_process_brings_back(tmp_path, settled):
    paths, memo_path = [tmp_path / name for name in "abc"], tmp_path / "memo.json"
    for path in paths:
        path.write_bytes(path.name.encode())
    noted(memo_path, *paths[:2])
    mine, other = digests.DigestMemo(memo_path), digests.DigestMemo(memo_path)
    mine.forget(paths[0])
    assert mine.get(paths[0]) is None
    digests.blake3_file(paths[2], other)
    other.save()
    known = digests.DigestMemo(memo_path)
    assert [known.get(path) is None for path in paths] == [True, False, False]
    again = digests.blake3_file(paths[0], mine)
    mine.save()
    assert digests.DigestMemo(memo_path).get(paths[0]) == again


def test_a_memo_knows_odd_names_and_needs_no_place_to_be_saved(tmp_path, settled):
    path = os.path.join(os.fsencode(tmp_path), b"\xff.png").decode("utf-8", "surrogateescape")
    with open(path, "wb") as handle:
        handle.write(b"x")
    os.utime(path, (1e9, 1e9))
    memo = digests.DigestMemo(tmp_path / "memo.json")
    digest = digests.blake3_file(path, memo)
    memo.save()
    assert digests.DigestMemo(tmp_path / "memo.json").get(path) == digest
    (tmp_path / "file").write_text("")
    nowhere = digests.DigestMemo(tmp_path / "file/memo.json")
    digests.blake3_file(path, nowhere)
    nowhere.save()
    assert nowhere.get(path) == digest
