"""Looking after the cache: what is sound, what made an entry, what nobody needs; only our own files ever go."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in_cache import RECIPES, damage, entries, fill, manager, spec

from qflux.data import cache_care
from qflux.data.cache_care import collect, explain, needed, verify
from qflux.data.cache_manager import CacheDamaged, CacheManager
from qflux.errors import Locked, UserError
from qflux.io import locks
from qflux.types import Resize, SampleSpec


@pytest.fixture
def specs() -> list[SampleSpec]:
    return [spec(i, prompt=f"prompt {i % 3}") for i in range(6)]


@pytest.fixture
def cache(tmp_path: Path, specs: list[SampleSpec]) -> CacheManager:
    """Six pictures, three prompts."""
    made = manager(tmp_path / "cache")
    fill(made, specs)
    return made


def entry(cache: CacheManager, one: SampleSpec, stage: str = "vae") -> Path:
    return cache.path(stage, cache.keys(one)[stage])


def everything(folder: Path) -> dict[Path, bytes | None]:
    """All files and folders with what is in them."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_what_is_needed_tells_whose_it_is(cache: CacheManager, specs: list[SampleSpec]) -> None:
    found = needed([(cache, specs[:4]), (cache, specs[2:])])
    assert len(found) == 9
    assert [one.whose for (stage, _), one in found.items() if stage == "text"] == [
        "samples 'id-0', 'id-3'", "samples 'id-1', 'id-4'", "samples 'id-2', 'id-5'",
    ]  # fmt: skip
    assert found["vae", cache.keys(specs[5])["vae"]].whose == "sample 'id-5'"
    shared = needed([(cache, [replace(one, prompt="") for one in specs])])
    assert {one.whose for (stage, _), one in shared.items() if stage == "text"} == {
        "samples 'id-0', 'id-1', 'id-2' and 3 more"
    }


def test_verify_names_what_is_wrong_and_changes_nothing(cache: CacheManager, specs: list[SampleSpec]) -> None:
    wanted = needed([(cache, specs)])
    sound = verify(cache, wanted)
    assert (sound.ok, sound.good, sound.size) == (True, 9, sum(path.stat().st_size for path in entries(cache.root)))
    assert sound.text() == f"cache {cache.root}: 9 good ({sound.size / 1024:.1f} KiB), 0 damaged, 0 missing"
    cut, lost, other, folder = (entry(cache, one) for one in specs[:4])
    cut.write_bytes(damage(cut.read_bytes(), "flip", 7000))
    lost.unlink()
    other.write_bytes(entry(cache, specs[5]).read_bytes())
    folder.unlink()
    folder.mkdir()
    Path(f"{entry(cache, specs[4])}.damaged").touch()  # marked, but sound
    before = everything(cache.root)
    found = verify(cache, wanted)
    assert everything(cache.root) == before
    assert not found.ok
    assert (found.good, len(found.damaged), len(found.missing)) == (5, 3, 1)
    lines = found.text().splitlines()
    assert lines[0] == (
        f"{cut}: damaged cache entry: its content does not match its digest; run --cache to encode it again "
        "(sample 'id-0')"
    )
    assert "under a wrong name; run --cache to encode it again (sample 'id-2')" in lines[1]
    assert f"{folder}: cannot read this cache entry" in lines[2]
    assert lines[3] == f"{lost}: missing vae entry of sample 'id-1'"
    assert ": 5 good (" in lines[4]
    assert "3 damaged, 1 missing" in lines[4]
    assert lines[5].startswith("nothing was changed")


def test_verify_tells_what_is_too_much_and_counts_a_long_list(cache: CacheManager, specs: list[SampleSpec]) -> None:
    few = verify(cache, needed([(cache, specs[:1])]))
    assert (few.ok, few.good, few.spare) == (True, 2, 7)
    assert "7 more (" in few.text()
    more = verify(cache, needed([(cache, [spec(i) for i in range(100, 140)])]))
    assert (len(more.missing), len(more.text().splitlines())) == (41, 20 + 1 + 3)
    assert "and 21 more that are missing" in more.text()
    assert not verify(manager(cache.root / "nowhere"), needed([(manager(cache.root / "nowhere"), specs)])).ok


def test_collect_deletes_what_is_not_needed_and_says_how_much(cache: CacheManager, specs: list[SampleSpec]) -> None:
    wanted = needed([(cache, specs[:2])])
    spare = [path for path in entries(cache.root) if (path.parts[-3], path.stem) not in wanted]
    size = sum(path.stat().st_size for path in spare)
    good = {path: path.read_bytes() for path in entries(cache.root) if path not in spare}
    (kept := Path(f"{entry(cache, specs[0])}.damaged")).touch()
    for path in spare[:2]:
        Path(f"{path}.damaged").touch()
    part = good.popitem()[0].parent
    temps = [cache.root / ".qflux-tmp-999999999-1-digests.json", part / ".qflux-tmp-999999999-2-x"]
    temps += [folder / ".qflux-tmp-1-0123456789ab.3-x" for folder in (cache.root, part)]  # of another container
    for path in temps:
        path.write_text("half")
    done = collect(cache, wanted)
    assert (done.entries, done.size, done.kept, done.marks, done.temps) == (5, size, 4, 2, 4)
    assert done.strange == done.failed == []
    assert f"deleted 5 entries ({size} bytes, " in done.text()
    assert "2 marks and 4 temporary files" in done.text()
    assert {path: path.read_bytes() for path in good} == good
    assert kept.exists()
    assert len(entries(cache.root)) == 4
    assert not any(path.is_dir() and not any(path.iterdir()) for path in cache.root.rglob("*"))
    again = collect(cache, wanted)
    assert (again.entries, again.size, again.kept, again.marks, again.temps) == (0, 0, 4, 0, 0)


def strangers(root: Path, outside: Path, spare: Path) -> list[Path]:
    """Files, links and folders that are not ours, some with our names."""
    key = "ab" + "0" * 62
    place, part = root / "vae" / "ab", spare.parent
    place.mkdir(exist_ok=True)
    (outside / "ab").mkdir(parents=True)
    plain = [
        root / "notes.txt", root / "model.safetensors", root / "vae" / "notes.txt", root / "vae" / spare.name,
        place / "x.safetensors", place / f"{key}.safetensors.bak", place / f"{key.upper()}.safetensors",
        place / f"{key}.safetensors", part / f"{'f' * 64}.safetensors.damaged.txt", place / "note.damaged",
        place / f".{key}.safetensors", root / "vae" / "abc" / spare.name, root / "deep" / "vae" / "ab" / spare.name,
    ]  # fmt: skip
    for path in plain:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(spare.read_bytes() if path.name == spare.name else b"somebody's work")
    (outside / "ab" / spare.name).write_bytes(spare.read_bytes())
    full = place / f"ab{'1' * 62}.safetensors.damaged"
    full.write_text("a mark has nothing in it")
    folder = place / f"ab{'2' * 62}.safetensors"
    (folder / "inside").mkdir(parents=True)
    copied = spare.with_name(spare.name[:2] + "3" * 62 + ".safetensors")
    copied.write_bytes(spare.read_bytes())  # ours, under a name that is not its own
    link = spare.with_name(spare.name[:2] + "4" * 62 + ".safetensors")
    link.symlink_to(outside / "ab" / spare.name)
    (root / "linked").symlink_to(outside)
    (empty := root / "mine" / "ab").mkdir(parents=True)
    return [*plain, full, folder / "inside", copied, link, empty, root / "linked", outside / "ab" / spare.name]


def test_collect_touches_nothing_that_is_not_ours(cache: CacheManager, specs: list[SampleSpec], tmp_path: Path) -> None:
    ours = set(entries(cache.root))
    others = strangers(cache.root, tmp_path / "outside", entry(cache, specs[4]))
    spoilt = entry(cache, specs[5])
    spoilt.write_bytes(bytes(spoilt.stat().st_size))  # what it was cannot be told any more
    before = everything(tmp_path)
    done = collect(cache, {})
    assert done.entries == 8
    gone = {path for path in before if not os.path.lexists(path)}
    assert {path for path in gone if before[path] is not None} == ours - {spoilt}
    assert all(before[path] == now for path, now in everything(tmp_path).items() if path.name != ".lock")
    assert all(os.path.lexists(path) for path in others)
    assert len(done.strange) == 3, done.strange
    assert all("left alone: it has the name of a cache entry" in line for line in done.strange)


def test_collect_waits_for_no_writer_and_makes_no_folder(cache: CacheManager, tmp_path: Path) -> None:
    with locks.hold(cache.root / ".lock", "the cache"), pytest.raises(Locked, match=f"process {os.getpid()}"):
        collect(cache, {})
    assert len(entries(cache.root)) == 9
    assert collect(manager(tmp_path / "nowhere"), {}).entries == 0
    assert not (tmp_path / "nowhere").exists()


def test_collect_tells_what_it_cannot_delete(
    cache: CacheManager, specs: list[SampleSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        done = collect(cache, needed([(cache, specs[1:])]))
    assert (done.entries, done.kept) == (0, 8)
    assert done.failed == [f"{entry(cache, specs[0])}: cannot be deleted: Permission denied"]


def test_explain_tells_what_made_an_entry(cache: CacheManager, specs: list[SampleSpec]) -> None:
    path = entry(cache, specs[0])
    lines = explain(cache, needed([(cache, specs)]), path).splitlines()
    assert lines[0].startswith(f"{path}: vae entry, ")
    assert lines[1:] == [
        "made from control_sizes: [[[0.0, 0.0, 32.0, 32.0], [16, 16]]]",
        'made from controls: ["control-0-0"]',
        "made from mask: null",
        'made from target: "target-0"',
        "made from target_size: [[0.0, 0.0, 32.0, 32.0], [16, 16]]",
        'made with dtype: "bfloat16"',
        'made with posterior: "mode"',
        'made with weights: "w1"',
        "current: this config needs it for sample 'id-0'",
    ]


OTHER = Resize((0, 0, 32, 32), (32, 16))
STALE = [
    ("vae", {"target": "new"}, 'target: made with "target-0", now "new"'),
    ("vae", {"controls": ("new",)}, 'controls: made with ["control-0-0"], now ["new"]'),
    ("vae", {"mask": "m"}, 'mask: made with null, now "m"'),
    (
        "vae",
        {"sizes": replace(spec().sizes, target=OTHER)},
        "target_size: made with [[0.0, 0.0, 32.0, 32.0], [16, 16]], now [[0.0, 0.0, 32.0, 32.0], [32, 16]]",
    ),
    ("text", {"prompt": "prompt 0 and more"}, 'prompt: made with "prompt 0", now "prompt 0 and more"'),
]


@pytest.mark.parametrize(("stage", "change", "line"), STALE, ids=lambda value: str(value)[:20])
def test_explain_names_the_input_that_changed(
    cache: CacheManager, specs: list[SampleSpec], stage: str, change: dict, line: str
) -> None:
    now = [replace(specs[0], **change), replace(specs[1], prompt="of something else")]
    told = explain(cache, needed([(cache, now)]), entry(cache, specs[0], stage)).splitlines()
    assert told[-2:] == ["stale: for sample 'id-0', the nearest of this config, another entry is needed", f"  {line}"]


def test_explain_names_the_parts_of_a_recipe_that_changed(cache: CacheManager, specs: list[SampleSpec]) -> None:
    recipe = {**RECIPES["vae"], "dtype": "float32", "weights": {"vae": "a" * 64}, "quantized": {"vae": "int8"}}
    other = manager(cache.root, {**RECIPES, "vae": recipe}, schema=2)
    told = explain(other, needed([(other, specs)]), entry(cache, specs[3])).splitlines()
    assert told[told.index("stale: for sample 'id-3', the nearest of this config, another entry is needed") + 1 :] == [
        '  recipe.dtype: made with "bfloat16", now "float32"',
        '  recipe.quantized.vae: made with nothing, now "int8"',
        '  recipe.weights: made with "w1", now {"vae": "' + "a" * 64 + '"}',
        '  schema: made with "1", now "2"',
    ]


def test_explain_says_where_nothing_is_alike(cache: CacheManager, specs: list[SampleSpec]) -> None:
    far = needed([(cache, [spec(90, prompt="of something else")])])
    for stage in ("vae", "text"):
        assert explain(cache, far, entry(cache, specs[0], stage)).endswith("stale: this config has no sample like it")
    other = CacheManager(cache.root, cache.stages[:1], RECIPES, text_sees_controls=False)
    assert explain(other, {}, entry(cache, specs[0], "text")).endswith("stale: this config's stages are vae")


def test_explain_of_what_is_damaged_or_no_entry(cache: CacheManager, specs: list[SampleSpec], tmp_path: Path) -> None:
    wanted = needed([(cache, specs)])
    one, two, three = (entry(cache, each) for each in specs[:3])
    one.write_bytes(one.read_bytes()[:-1])
    told = explain(cache, wanted, one).splitlines()[-1]
    assert told == ("damaged: its content does not match its digest; --cache makes the entry of sample 'id-0' again")
    data = two.read_bytes()
    two.write_bytes(three.read_bytes())
    told = explain(cache, wanted, two)
    assert f"damaged: it is the entry vae/{three.stem} under a wrong name; --cache makes the entry of sample" in told
    (copy := tmp_path / "copy.safetensors").write_bytes(data)
    assert f"this config needs such an entry for sample 'id-1', at {two}" in explain(cache, wanted, copy)
    for wrong, found in ((b"", "no cache entry, or one whose header is damaged"), (None, "no such file")):
        three.unlink()
        if wrong is not None:
            three.write_bytes(wrong)
        with pytest.raises(
            UserError, match=f"{three.name}: {found}; --cache makes the vae entry of sample 'id-2' there"
        ):
            explain(cache, wanted, three)
    with pytest.raises(UserError, match=r"nothing: no such file$"):
        explain(cache, wanted, tmp_path / "nothing")
    with pytest.raises(UserError, match="no cache entry"):
        explain(cache, wanted, tmp_path)


def vanishing(patch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    """``path`` goes when a function of the module has been called for it, as another process deletes it."""
    call = getattr(cache_care, name)

    def called(*words: object) -> object:
        found = call(*words)
        if words[0] == path:
            path.unlink(missing_ok=True)
        return found

    patch.setattr(cache_care, name, called)


@pytest.mark.parametrize("name", ["_name", "read_entry"])
def test_verify_while_another_process_deletes(
    cache: CacheManager, specs: list[SampleSpec], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = entry(cache, specs[5 if name == "_name" else 0])
    vanishing(monkeypatch, name, path)
    found = verify(cache, needed([(cache, specs[:3])]))
    if name == "_name":
        assert (found.ok, found.good, found.spare) == (True, 6, 2)
    else:
        assert (found.good, len(found.missing), found.spare) == (5, 1, 3)


def test_explain_of_an_entry_that_vanishes(
    cache: CacheManager, specs: list[SampleSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry(cache, specs[0])
    vanishing(monkeypatch, "made_by", path)
    with pytest.raises(UserError, match="no such file; --cache makes the vae entry of sample 'id-0' there"):
        explain(cache, needed([(cache, specs)]), path)


@pytest.mark.parametrize("name", ["_name", "made_by"])
def test_collect_of_what_vanishes(
    cache: CacheManager, specs: list[SampleSpec], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    vanishing(monkeypatch, name, entry(cache, specs[0]))
    files, mark = cache_care._files, f"{'ab' * 32}.safetensors.damaged"  # taken away by who read the entry again
    monkeypatch.setattr(cache_care, "_files", lambda folder: [*files(folder), folder / mark])
    done = collect(cache, needed([(cache, specs[1:])]))
    assert (done.entries, done.kept, done.marks, done.failed, done.strange) == (0, 8, 0, [], [])


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_no_regular_file_is_damaged_and_not_waited_for(
    cache: CacheManager, specs: list[SampleSpec], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wanted = entry(cache, specs[0]), needed([(cache, specs)])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(path.parent)  # a socket's name is short
        socket.socket(socket.AF_UNIX).bind(path.name)
    found = verify(cache, wanted)
    assert (found.good, list(found.damaged.values())) == (
        8, [f"{path}: damaged cache entry: it is no regular file; run --cache to encode it again (sample 'id-0')"],
    )  # fmt: skip
    with pytest.raises(UserError, match="no cache entry"):
        explain(cache, wanted, path)
    assert (collect(cache, {}).entries, os.path.lexists(path)) == (8, True)
    with pytest.raises(CacheDamaged):
        cache.get(specs[0])
    report, _ = fill(cache, specs[:1], verify=True)
    assert (report.encoded, report.repaired) == (1, 1)
    assert path.is_file()
    assert cache.get(specs[0]).target is not None


def test_a_file_in_the_cache_s_place_is_an_error(tmp_path: Path, specs: list[SampleSpec]) -> None:
    (tmp_path / "file").touch()
    cache = manager(tmp_path / "file")
    for care in (verify, collect):
        with pytest.raises(UserError, match=r"^cache\.cache_dir: found .*file, a file, expected a folder"):
            care(cache, needed([(cache, specs)]))
