"""``--cache`` and its words on damaged entries, on one that is in use, on what is no entry."""

from __future__ import annotations

import json
import os
import threading

import pytest
from cached_pictures import TEXTS, Place
from stand_in_cache import damage, entries

from qflux.data import entry
from qflux.io import locks


def test_damage_is_found_named_and_repaired(place: Place) -> None:
    cache = place.project.cache
    good = {path: path.read_bytes() for path in entries(cache)}
    kinds = {("vae", "a"): "flip", ("vae", "b"): "cut", (TEXTS[0], "c"): "zero", (TEXTS[1], "a"): "add"}
    hurt = {place.old_entry(*one): one for one in [*kinds, (TEXTS[1], "b"), (TEXTS[1], "c")]}
    paths = list(hurt)
    for path, kind in zip(paths, kinds.values(), strict=False):
        path.write_bytes(damage(good[path], kind, 900))
    paths[4].write_bytes(good[paths[5]])
    paths[5].write_bytes(good[paths[4]])
    state = {path: path.read_bytes() for path in entries(cache)}
    seen = place.end("--cache", "verify")
    assert (seen.code, seen.err) == (2, "")
    assert {path for path in good if f"{path}: damaged cache entry: " in seen.out} == set(hurt)
    assert ": 3 good (" in seen.out
    assert "6 damaged, 0 missing" in seen.out
    assert {path: path.read_bytes() for path in entries(cache)} == state
    assert "deleted 0 entries" in place.run("--cache", "gc")
    assert "cache: 3 reused, 0 encoded, 6 repaired" in place.run("--cache")
    assert sorted(place.encoded) == sorted(hurt.values())
    assert {path: path.read_bytes() for path in entries(cache)} == good
    assert "9 good (" in place.run("--cache", "verify")


@pytest.mark.parametrize("mode", ["--cache", "--sample"])
def test_a_damaged_prompt_to_draw_is_encoded_again(place: Place, mode: str) -> None:
    samples = json.dumps([{"prompt": "draw it", "size": [64, 64]}])
    words = [f"logging.validation.samples={samples}", "logging.validation.num_inference_steps=2"]
    old = set(entries(place.project.cache))
    place.run("--cache", *words)
    (path,) = (path for path in entries(place.project.cache / TEXTS[0]) if path not in old)
    good = path.read_bytes()
    path.write_bytes(damage(good, "flip", 8 * len(good) - 100))
    place.encoded.clear()
    place.run(mode, *words)
    assert place.encoded == [(TEXTS[0], "sample-0")]
    assert path.read_bytes() == good


def test_training_verifies_each_entry_in_the_threads_that_read_ahead(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, content = [], entry._content

    def noting(view: memoryview) -> bytes:
        threads.append(threading.current_thread().name)
        return content(view)

    monkeypatch.setattr(entry, "_content", noting)
    place.run("train.max_train_steps=2", "data.batch_size=1", "train.loss.mask_loss=false")
    assert len(threads) >= 2 * 3
    assert all(name.startswith("reader") for name in threads), set(threads)


def test_a_cache_in_use_is_looked_at_but_not_swept(place: Place) -> None:
    with locks.hold(place.project.cache / ".lock", "the cache"):
        assert "9 good (" in place.run("--cache", "verify")
        assert "current: " in place.run("--cache", "explain", place.old_entry("vae", "a"))
        done = place.end("--cache", "gc", "data.target_size=[48, 48]")
    assert done.code == 75
    assert f"process {os.getpid()}" in done.err
    assert len(entries(place.project.cache)) == 9


def test_explaining_what_is_not_there(place: Place) -> None:
    done = place.end("--cache", "explain", "nothing.safetensors")
    assert done.code == 2
    assert "nothing.safetensors: no such file" in done.err
    (place.project.root / "other.safetensors").write_bytes(b"x" * 100)
    assert "other.safetensors: no cache entry" in place.end("--cache", "explain", "other.safetensors").err


@pytest.mark.parametrize("words", [["--cache"], ["train.max_train_steps=1"]], ids=["cache", "train"])
def test_a_file_where_a_cache_s_folder_should_be_is_named_in_one_line(place: Place, words: list[str]) -> None:
    path = place.old_entry("vae", "a")
    for one in path.parent.iterdir():
        one.unlink()
    path.parent.rmdir()
    path.parent.write_text("somebody's")
    done = place.end(*words)
    assert (done.code, done.err.count("\n")) == (3, 1), done.err
    assert done.err.startswith(f"{path.parent}: found a file, expected a folder; move it away"), done.err
    assert path.parent.read_text() == "somebody's"


@pytest.mark.parametrize("words", [["--cache"], ["train.max_train_steps=1"]], ids=["cache", "train"])
def test_a_pipe_with_an_entry_s_name_is_damage(place: Place, words: list[str]) -> None:
    path = place.old_entry("vae", "a")
    good = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    assert "8 good (" in place.end("--cache", "verify").out
    place.run(*words)
    assert place.encoded == [("vae", "a")]
    assert path.read_bytes() == good
