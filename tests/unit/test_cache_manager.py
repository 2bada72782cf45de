"""The cache cannot lie: every changed input and every flipped bit is found, and only what is wrong is made again."""

import contextlib
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from stand_in_cache import (
    IMAGE,
    PART,
    RECIPES,
    TEXT,
    Encoders,
    damage,
    entries,
    fill,
    forked,
    latents,
    manager,
    plan,
    spec,
)

from qflux.data import entry
from qflux.data.cache_manager import CacheDamaged, CacheMiss, read_entry
from qflux.data.feeder import feed
from qflux.errors import Locked, UserError
from qflux.io import digests, locks
from qflux.types import EncodedSample, Micro, Resize, Step


@pytest.fixture
def specs():
    return [spec(i, prompt=f"prompt {i % 3}", mask="m" if i == 0 else None) for i in range(8)]


def test_fill_then_get_gives_what_was_encoded(tmp_path, specs):
    cache = manager(tmp_path)
    report, encoders = fill(cache, specs)
    assert (report.reused, report.encoded, report.repaired, report.interrupted) == (0, 11, 0, False)
    assert report.line().startswith("cache: 0 reused, 11 encoded, 0 repaired in 0:")
    for one in specs:
        got = cache.get(one)
        assert torch.equal(got.target, latents(one.target))
        assert got.target.dtype == torch.bfloat16
        assert [torch.equal(a, latents(b)) for a, b in zip(got.controls, one.controls, strict=True)] == [True]
        assert torch.equal(got.text["t5"], latents(one.prompt)[0])
        assert got.sizes == one.sizes
        assert (got.edit_mask is not None) == (one.mask is not None)
    again, encoders = fill(cache, specs)
    assert (again.reused, again.encoded, again.repaired) == (11, 0, 0)
    assert encoders.opened == encoders.calls == encoders.loads == []


def test_prompts_are_encoded_once_and_stages_one_after_the_other(tmp_path, specs):
    encoders = fill(manager(tmp_path), specs)[1]
    assert encoders.opened == ["vae", "text"]
    assert [name for name, _ in encoders.calls] == ["vae"] * 8 + ["text"] * 3
    assert encoders.loads == [(i, True) for i in range(8)] + [(i, False) for i in range(3)]


def test_a_text_encoder_that_sees_controls_has_one_entry_per_control_set(tmp_path, specs):
    cache = manager(tmp_path, sees=True)
    empty = [replace(one, prompt="") for one in specs] + [replace(specs[0], prompt="", id="x", target="t")]
    encoders = fill(cache, empty)[1]
    assert [name for name, _ in encoders.calls].count("text") == 8
    assert all(pixels for _, pixels in encoders.loads)
    assert fill(manager(tmp_path / "blind"), empty)[1].calls[-1] == ("text", "id-0")


def changed_specs():
    one = spec(controls=2, mask="m")
    size, box = (16, 32), Resize((0.5, 0, 32, 32), (16, 16))
    image, both = {"vae"}, {"vae", "text"}
    return [
        (replace(one, id="other name"), set(), set()),
        (replace(one, prompt="make it red "), {"text"}, {"text"}),
        (replace(one, target="other"), image, image),
        (replace(one, target=None), image, image),
        (replace(one, controls=one.controls[::-1]), image, both),
        (replace(one, controls=one.controls[:1]), image, both),
        (replace(one, mask="other"), image, image),
        (replace(one, mask=None), image, image),
        (replace(one, sizes=replace(one.sizes, target=Resize((0, 0, 32, 32), size))), image, image),
        (replace(one, sizes=replace(one.sizes, target=box)), image, image),
        (replace(one, sizes=replace(one.sizes, controls=(box, one.sizes.controls[1]))), image, both),
        (replace(one, sizes=replace(one.sizes, controls=(Resize((0, 0, 32, 32), size),) * 2)), image, both),
        (replace(one, sizes=replace(one.sizes, controls=(replace(PART, scaled=(17, 17)), PART))), image, both),
        (replace(one, sizes=replace(one.sizes, text_controls=(box, PART))), set(), {"text"}),
    ]


def differing(a, b):
    return {name for name in a if a[name] != b[name]}


@pytest.mark.parametrize("number", range(14))
def test_each_input_changes_exactly_its_keys(tmp_path, number):
    other, blind, seeing = changed_specs()[number]
    base = spec(controls=2, mask="m")
    for sees, expected in ((False, blind), (True, seeing)):
        cache = manager(tmp_path, sees=sees)
        assert differing(cache.keys(base), cache.keys(other)) == expected
    assert len(changed_specs()) == 14


@pytest.mark.parametrize("stage", ["vae", "text"])
def test_each_part_of_a_recipe_changes_its_stages_keys(tmp_path, stage):
    base = manager(tmp_path).keys(spec())
    for name in RECIPES[stage]:
        for recipe in ({**RECIPES[stage], name: "other"}, {k: v for k, v in RECIPES[stage].items() if k != name}):
            assert differing(base, manager(tmp_path, {**RECIPES, stage: recipe}).keys(spec())) == {stage}
    more = {**RECIPES, stage: {**RECIPES[stage], "new": None}}
    assert differing(base, manager(tmp_path, more).keys(spec())) == {stage}
    assert differing(base, manager(tmp_path, schema=2).keys(spec())) == {"vae", "text"}
    reordered = {name: dict(reversed(recipe.items())) for name, recipe in RECIPES.items()}
    assert manager(tmp_path, reordered).keys(spec()) == base


def test_near_duplicates_have_their_own_keys(tmp_path):
    near = [spec(prompt=text) for text in ("", " ", "a", "A", "a\n", "é", "e\u0301", '"', "\\", "null")]
    near += [replace(spec(), controls=names) for names in ((), ("a", "b"), ("ab",), ("a", "b", ""), ("a,b",))]
    cache = manager(tmp_path, sees=True)
    assert len({cache.keys(one)["text"] for one in near}) == len(near)
    assert len({cache.keys(one)["vae"] for one in near}) == 6  # the prompts share their picture


def test_same_bytes_whoever_makes_the_entry(tmp_path, specs):
    for name in "ab":
        fill(manager(tmp_path / name), specs if name == "a" else specs[::-1])
    for left, right in zip(entries(tmp_path / "a"), entries(tmp_path / "b"), strict=True):
        assert left.name == right.name
        assert left.read_bytes() == right.read_bytes()


def test_every_kind_of_damage_is_found(tmp_path):
    one = spec(mask="m")
    cache = manager(tmp_path)
    fill(cache, [one])
    for stage, key in cache.keys(one).items():
        path = cache.path(stage, key)
        data = path.read_bytes()
        places = random.Random(0)
        wrong = [damage(data, "flip", bit) for bit in range(0, 8 * len(data), 19)] + [damage(data, "add", 0)]
        wrong += [damage(data, kind, places.randrange(len(data))) for kind in ("cut", "zero") for _ in range(30)]
        for bad in wrong:
            if bad == data:
                continue  # a tail of zeros zeroed
            path.write_bytes(bad)
            with pytest.raises(CacheDamaged, match=f"{key}.safetensors: damaged cache entry"):
                read_entry(path, stage, key)
        path.write_bytes(data)
        read_entry(path, stage, key)


def test_entries_are_verified_in_the_threads_that_read_ahead(tmp_path, specs, monkeypatch):
    cache, threads, digest = manager(tmp_path), [], entry._content
    fill(cache, specs)

    def content(view):
        threads.append(threading.current_thread().name)
        return digest(view)

    monkeypatch.setattr(entry, "_content", content)
    steps = [Step(n, (Micro(((0, n), (0, n + 1)), 1.0),)) for n in range(6)]
    assert len(list(feed(steps, lambda _, index: cache.get(specs[index]), 2))) == 6
    assert len(threads) == 6 * 2 * 2, "each of both stages' entries, each time it is read"
    assert all(name.startswith("reader") for name in threads)


@pytest.mark.parametrize("found_by", ["verify", "get"])
def test_only_the_damaged_are_repaired(tmp_path, specs, found_by):
    cache = manager(tmp_path)
    fill(cache, specs)
    good = {path: path.read_bytes() for path in entries(tmp_path)}
    paths = [cache.path("vae", cache.keys(specs[i])["vae"]) for i in (1, 2, 3, 4)]
    paths.append(cache.path("text", cache.keys(specs[0])["text"]))
    for path, kind in zip(paths[2:], ("flip", "cut", "zero"), strict=True):
        path.write_bytes(damage(good[path], kind, 700))
    paths[0].write_bytes(good[paths[1]])
    paths[1].write_bytes(good[paths[0]])  # two entries swapped
    if found_by == "get":
        for one in specs:
            with contextlib.suppress(CacheDamaged):
                cache.get(one)
        cache = manager(tmp_path)  # what a reader found is known to the next process
    verify = found_by == "verify"
    assert sum(map(len, cache.missing(specs, verify=verify).values())) == 5
    report, encoders = fill(cache, specs, verify=verify)
    assert (report.reused, report.encoded, report.repaired) == (6, 0, 5)
    assert sorted(encoders.calls) == sorted([("vae", f"id-{i}") for i in (1, 2, 3, 4)] + [("text", "id-0")])
    assert {path: path.read_bytes() for path in entries(tmp_path)} == good
    assert not list(tmp_path.rglob("*.damaged"))
    assert fill(cache, specs, verify=True)[0].reused == 11


def test_a_gap_is_named_and_only_it_is_filled(tmp_path, specs):
    cache = manager(tmp_path)
    fill(cache, specs)
    key = cache.keys(specs[5])["vae"]
    cache.path("vae", key).unlink()
    with pytest.raises(CacheMiss, match=f"{key}.safetensors: no vae cache entry for sample 'id-5'"):
        cache.get(specs[5])
    assert cache.missing(specs) == {"vae": {key: 5}, "text": {}}
    report, encoders = fill(cache, specs)
    assert (report.reused, report.encoded) == (10, 1)
    assert encoders.calls == [("vae", "id-5")]
    assert issubclass(CacheMiss, UserError)
    assert issubclass(CacheDamaged, UserError)


def test_stop_keeps_what_was_made_and_the_rerun_goes_on(tmp_path, specs):
    cache, encoders = manager(tmp_path), Encoders(specs)
    report, _ = fill(cache, specs, encoders, stop=lambda: len(encoders.calls) >= 3)
    assert (report.encoded, report.interrupted) == (3, True)
    assert "interrupted" in report.line()
    report, _ = fill(cache, specs)
    assert (report.reused, report.encoded, report.interrupted) == (3, 8, False)
    report, _ = fill(cache, specs, verify=True, stop=lambda: True)
    assert report.interrupted


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name_and_the_rest_kept(tmp_path, specs, value):
    class Poisoned(Encoders):
        def encode(self, stage, sample):
            made = super().encode(stage, sample)
            if (stage.name, sample.id) == ("vae", "id-2"):
                made.controls[0][1, 1, 1] = value
            return made

    cache = manager(tmp_path)
    with pytest.raises(UserError, match="sample 'id-2': stage vae gave 1 non-finite of 16 values in control_0"):
        fill(cache, specs, Poisoned(specs))
    assert cache.missing(specs) == {"vae": {cache.keys(specs[2])["vae"]: 2}, "text": {}}


def test_fill_gives_up_after_a_few_failures(tmp_path):
    specs = [spec(i) for i in range(30)]

    class Broken(Encoders):
        def encode(self, stage, sample):
            raise UserError(f"{sample.id} failed")

    encoders = Broken(specs)
    with pytest.raises(UserError) as caught:
        fill(manager(tmp_path), specs, encoders)
    assert len(caught.value.problems) == 8
    assert encoders.opened == ["vae"]
    assert len(encoders.loads) < 13


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (IMAGE, {"target": None}, r"gave no \['target'\]"),
        (IMAGE, {"controls": []}, r"gave no \['control_0'\]"),
        (IMAGE, {"edit_mask": None}, r"gave no \['edit_mask'\]"),
        (IMAGE, {"controls": [torch.ones(1)] * 2}, r"gave \['control_1'\], which the sample does not have"),
        (IMAGE, {"text": {"t5": torch.ones(1)}}, r"gave \['text.t5'\]"),
        (TEXT, {}, r"gave \['control_0', 'edit_mask', 'target'\], which are not text"),
        (TEXT, {"target": None, "controls": [], "edit_mask": None}, "gave no text"),
    ],
)
def test_a_stage_must_give_what_the_sample_needs(tmp_path, stage, change, message):
    whole = EncodedSample(torch.ones(1), [torch.ones(1)], {}, torch.ones(1), plan())
    with pytest.raises(UserError, match=message):
        manager(tmp_path).write(stage, spec(mask="m"), replace(whole, **change))
    assert not entries(tmp_path)


def test_one_writer_at_a_time_but_a_full_cache_needs_no_lock(tmp_path, specs):
    cache = manager(tmp_path)
    fill(cache, specs[:4])
    with locks.hold(tmp_path / ".lock", "the cache"):
        assert fill(cache, specs[:4])[0].reused == 7
        with pytest.raises(Locked, match=f"process {os.getpid()}"):
            fill(cache, specs)


def test_threads_of_one_process_fill_one_after_the_other_and_sweep_what_a_killed_one_left(tmp_path, specs):
    cache = manager(tmp_path)
    (left := tmp_path / ".qflux-tmp-999999999-1-digests.json").write_text("")
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda _: fill(cache, specs)[0], range(3)))
    assert sorted((report.encoded, report.reused) for report in reports) == [(0, 11), (0, 11), (11, 0)]
    assert not left.exists()


def test_an_entry_tells_what_made_it(tmp_path):
    cache = manager(tmp_path)
    fill(cache, [spec()])
    key = cache.keys(spec())["vae"]
    metadata = read_entry(cache.path("vae", key), "vae", key)[1]
    assert metadata["recipe"] == digests.canonical_json(RECIPES["vae"])
    assert metadata["inputs"] == digests.canonical_json(cache.inputs(IMAGE, spec()))
    assert (metadata["schema"], metadata["stage"], metadata["key"]) == ("1", "vae", key)


def test_an_unreadable_entry_is_a_users_error(tmp_path):
    cache = manager(tmp_path)
    for name, key in cache.keys(spec()).items():
        cache.path(name, key).mkdir(parents=True)
    with pytest.raises(UserError, match="cannot read this cache entry"):
        cache.get(spec())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot lock"):
        fill(manager(tmp_path / "file"), [spec()])


def test_killed_at_any_time_the_rerun_completes_it(tmp_path):
    specs = [spec(i, prompt=f"prompt {i}") for i in range(40)]

    class Slow(Encoders):
        def encode(self, stage, sample):
            time.sleep(0.006)
            return super().encode(stage, sample)

    for count in (3, 30):
        child = forked(lambda: fill(manager(tmp_path), specs, Slow(specs)))
        while len(entries(tmp_path)) < count and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    made = {path: path.read_bytes() for path in entries(tmp_path)}
    stale = tmp_path / "vae" / entries(tmp_path)[-1].parent.name / ".qflux-tmp-99999999-1-x.safetensors"
    stale.parent.mkdir(parents=True, exist_ok=True)
    elsewhere = stale.with_name(".qflux-tmp-1-0123456789ab.1-x.safetensors")  # of another container: the lock is free
    for path in (stale, elsewhere, tmp_path / elsewhere.name):
        path.write_text("half")
    report, _ = fill(manager(tmp_path), specs, verify=True)
    assert (report.reused, report.encoded, report.repaired) == (len(made), 80 - len(made), 0)
    assert 30 <= len(made) < 80
    assert all(path.read_bytes() == data for path, data in made.items())
    assert not list(tmp_path.rglob(".qflux-tmp-*"))
    assert fill(manager(tmp_path), specs, verify=True)[0].reused == 80


def test_a_cache_that_cannot_be_written_cannot_be_repaired_there(tmp_path, specs, monkeypatch):
    cache = manager(tmp_path)
    fill(cache, specs)
    path = cache.path("vae", cache.keys(specs[0])["vae"])
    path.write_bytes(damage(path.read_bytes(), "flip", 5000))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(UserError, match=r"1 damaged .*cannot be repaired there") as caught:
            fill(cache, specs, verify=True)
        assert str(tmp_path) in str(caught.value)
        assert str(path) in str(caught.value)
        fill(cache, specs[1:], verify=True)
    assert fill(cache, specs, verify=True)[0].repaired == 1
