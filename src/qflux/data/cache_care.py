"""Looking after a cache: which entries are sound, what made an entry, which ones a config does not need.

Each function takes the entries that a config needs, as :func:`needed` lists them from what makes the cache. Only
:func:`collect` changes anything: it deletes files that are ours by their name and by what is in them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qflux.data.cache_manager import MARK, SUFFIX, CacheManager
from qflux.data.entry import CacheDamaged, made_by, read_entry
from qflux.errors import UserError
from qflux.io import atomic, digests, locks
from qflux.io.json_files import strict_loads
from qflux.io.places import listed, refuse_file
from qflux.io.progress import Progress
from qflux.types import SampleSpec

_ENTRY = re.compile(r"[0-9a-f]{64}" + re.escape(SUFFIX))
_PART = re.compile(r"[0-9a-f]{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TELLING = ("target", "controls", "mask", "prompt")  # inputs by which an entry's sample is known again
_SHOWN = 20  # missing entries that are named one by one
_NOTHING = object()  # in place of a value where there is none

Name = tuple[str, str]  # (stage, key)


@dataclass
class Needed:
    """An entry that the config needs: its file, its inputs, the ids of the samples that share it."""

    path: Path
    inputs: dict[str, Any]
    samples: dict[str, None] = field(default_factory=dict)

    @property
    def whose(self) -> str:
        """``sample 'a'`` or ``samples 'a', 'b', 'c' and 4 more``."""
        ids = [repr(name) for name in self.samples]
        return f"sample{'s' if len(ids) > 1 else ''} {listed(ids, 3)}"


def needed(parts: Iterable[tuple[CacheManager, Iterable[SampleSpec]]]) -> dict[Name, Needed]:
    """All entries that caches, or views of one through some of its stages, need for their samples."""
    found: dict[Name, Needed] = {}
    for cache, specs in parts:
        for spec in specs:
            for stage in cache.stages:
                key = cache.key(stage, spec)
                if (stage.name, key) not in found:
                    inputs = json.loads(digests.canonical_json(cache.inputs(stage, spec)))
                    found[stage.name, key] = Needed(cache.path(stage.name, key), inputs)
                found[stage.name, key].samples[spec.id] = None
    return found


@dataclass
class Verified:
    """What :func:`verify` found; ``damaged`` and ``missing`` are one line each, by entry."""

    root: Path
    good: int = 0
    size: int = 0
    damaged: dict[Name, str] = field(default_factory=dict)
    missing: dict[Name, str] = field(default_factory=dict)
    spare: int = 0
    spare_size: int = 0

    @property
    def ok(self) -> bool:
        """Whether everything that is needed is there and sound."""
        return not self.damaged and not self.missing

    def text(self) -> str:
        """The report for people: every damaged entry, the first missing ones, the counts, what to do."""
        lines = [*self.damaged.values(), *list(self.missing.values())[:_SHOWN]]
        if len(self.missing) > _SHOWN:
            lines.append(f"and {len(self.missing) - _SHOWN} more that are missing")
        counts = f"{self.good} good ({_size(self.size)}), {len(self.damaged)} damaged, {len(self.missing)} missing"
        lines.append(f"cache {self.root}: {counts}")
        if self.spare:
            lines.append(f"{self.spare} more ({_size(self.spare_size)}) are not needed by this config; see --cache gc")
        if not self.ok:
            lines.append("nothing was changed; --cache makes what is damaged or missing, and leaves the rest as it is")
        return "\n".join(lines)


def verify(cache: CacheManager, wanted: Mapping[Name, Needed]) -> Verified:
    """Read every entry that is needed, whole; changes nothing and takes no lock."""
    refuse_file(cache.root, "cache.cache_dir", "name the cache's")
    found = Verified(cache.root)
    with Progress(len(wanted), "checking cache") as bar:
        for (stage, key), one in wanted.items():
            try:
                read_entry(one.path, stage, key)
                found.size += one.path.stat().st_size
                found.good += 1
            except FileNotFoundError:
                found.missing[stage, key] = f"{one.path}: missing {stage} entry of {one.whose}"
            except UserError as error:
                found.damaged[stage, key] = f"{error} ({one.whose})"
            bar.advance()
    for path in _entries(cache.root):
        if _name(path) not in wanted:
            with suppress(FileNotFoundError):  # another process may be collecting them
                found.spare_size += path.stat().st_size
                found.spare += 1
    return found


@dataclass
class Collected:
    """What :func:`collect` deleted and left; ``strange`` and ``failed`` are one line each."""

    root: Path
    entries: int = 0
    size: int = 0
    kept: int = 0
    marks: int = 0
    temps: int = 0
    strange: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    folders: set[Path] = field(default_factory=set)  # where something was deleted

    def text(self) -> str:
        """The report for people."""
        gone = f"{self.entries} entries ({self.size} bytes, {_size(self.size)}) that this config does not need"
        rest = f"{self.marks} marks and {self.temps} temporary files that no process needs"
        line = f"cache {self.root}: deleted {gone}, {rest}; kept {self.kept} entries"
        return "\n".join([*self.failed, *self.strange, line])


def collect(cache: CacheManager, wanted: Mapping[Name, Needed]) -> Collected:
    """Delete the entries that are not needed, marks without an entry, and temp files of processes that are gone.

    An entry goes only where its name and its metadata are those that the cache gives; a link, another file or another
    folder is never touched. ``Locked`` when another process writes into this cache.
    """
    refuse_file(cache.root, "cache.cache_dir", "name the cache's")
    done = Collected(cache.root)
    if not cache.root.is_dir():
        return done
    with locks.hold(cache.root / ".lock", f"the cache {cache.root}"):
        for path in list(_entries(cache.root)):
            _judge(path, wanted, done)
        done.temps += len(atomic.sweep(cache.root, alone=True))
        for folder in list(_parts(cache.root)):
            done.temps += len(atomic.sweep(folder, alone=True))
            for path in list(_files(folder)):
                if _is_mark(path) and not path.with_name(path.name.removesuffix(MARK)).exists():
                    done.marks += _deleted(path, done)
        for folder in sorted({*done.folders, *(part.parent for part in done.folders)}, reverse=True):
            with suppress(OSError):
                folder.rmdir()  # does nothing to a folder that holds anything
    return done


def _judge(path: Path, wanted: Mapping[Name, Needed], done: Collected) -> None:
    """Keep or delete one file that has an entry's name."""
    if _name(path) in wanted:
        done.kept += 1
        return
    size, said = _length(path), made_by(path)
    if size is None:
        return
    if said is None or (said["stage"], said["key"]) != _name(path):
        done.strange.append(f"{path}: left alone: it has the name of a cache entry, but not what is in one")
        return
    if _deleted(path, done):
        done.entries += 1
        done.size += size


def _deleted(path: Path, done: Collected) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        done.failed.append(f"{path}: cannot be deleted: {error.strerror}")
        return False
    done.folders.add(path.parent)
    return True


def _parts(root: Path) -> Iterator[Path]:
    """The parts of stages' folders that are laid out as the cache is; no links."""
    for stage in _sorted(root, lambda path: path.is_dir()):
        yield from _sorted(stage, lambda path: path.is_dir() and _PART.fullmatch(path.name) is not None)


def _files(folder: Path) -> Iterator[Path]:
    yield from _sorted(folder, lambda path: path.is_file())


def _sorted(folder: Path, fits: Callable[[Path], bool]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.is_symlink() and fits(path))
    except OSError:
        return []


def _entries(root: Path) -> Iterator[Path]:
    """Files with an entry's name at an entry's place."""
    for folder in _parts(root):
        yield from (p for p in _files(folder) if _ENTRY.fullmatch(p.name) and p.name[:2] == folder.name)


def _is_mark(path: Path) -> bool:
    name = path.name.removesuffix(MARK)
    return name != path.name and _ENTRY.fullmatch(name) is not None and _length(path) == 0


def _length(path: Path) -> int | None:
    """Bytes of a file; None where it has vanished."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _name(path: Path) -> Name:
    return path.parent.parent.name, path.name.removesuffix(SUFFIX)


def explain(cache: CacheManager, wanted: Mapping[Name, Needed], path: Path) -> str:
    """What made the entry in a file, and why the config does not need it: what differs, by name, with both values.

    ``UserError`` where there is no entry.
    """
    path = path.absolute()
    known = wanted.get(_name(path))
    said = made_by(path)
    try:
        inputs, recipe = (dict(strict_loads((said or {})[part].encode())) for part in ("inputs", "recipe"))
        lines = [*_listed("made from", inputs), *_listed("made with", recipe)]
        size, damage = path.stat().st_size, _damage(path)
    except (KeyError, ValueError, TypeError, RecursionError, FileNotFoundError):
        found = "no cache entry, or one whose header is damaged" if path.exists() else "no such file"
        told = f"; --cache makes the {path.parent.parent.name} entry of {known.whose} there" if known else ""
        raise UserError(f"{path}: {found}{told}") from None
    assert said is not None
    lines.insert(0, f"{path}: {said['stage']} entry, {_size(size)}")
    name = (said["stage"], said["key"])
    if damage is not None:
        lines.append(f"damaged: {damage}" + (f"; --cache makes the entry of {known.whose} again" if known else ""))
    elif known:
        lines.append(f"current: this config needs it for {known.whose}")
    if known is None and name in wanted:
        lines.append(f"this config needs such an entry for {wanted[name].whose}, at {wanted[name].path}")
    elif known is None:
        lines += _staleness(cache, wanted, said, inputs, recipe)
    return "\n".join(lines)


def _damage(path: Path) -> str | None:
    try:
        read_entry(path, *_name(path))
    except CacheDamaged as error:
        return error.found
    return None


def _staleness(
    cache: CacheManager,
    wanted: Mapping[Name, Needed],
    said: Mapping[str, str],
    inputs: dict[str, Any],
    recipe: dict[str, Any],
) -> list[str]:
    """Why no sample of the config has this entry."""
    stage = said["stage"]
    if stage not in cache.recipes:
        return [f"stale: this config's stages are {', '.join(cache.recipes)}"]
    near = _nearest(inputs, [one for (other, _), one in wanted.items() if other == stage])
    differing = [] if near is None else _differences("", inputs, near.inputs)
    differing += _differences("recipe", recipe, json.loads(cache.recipes[stage]))
    differing += _differences("schema", said["schema"], str(cache.schema))
    if near is None:
        lines = ["stale: this config has no sample like it"]
    else:
        lines = [f"stale: for {near.whose}, the nearest of this config, another entry is needed"]
    return lines + [f"  {name}: made with {_shown(made)}, now {_shown(now)}" for name, made, now in differing]


def _listed(title: str, values: Mapping[str, Any]) -> list[str]:
    """``title`` and each value by its full name, one line each."""
    return [f"{title} {name}: {_shown(value)}" for name, value, _ in _differences("", values, {})]


def _differences(name: str, made: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(full name, value then, value now) wherever two JSON values differ; mappings by their entries."""
    if made == now:
        return []
    pair = [{} if side is _NOTHING else side for side in (made, now)]
    if not all(isinstance(side, dict) for side in pair) or not any(pair):
        return [(name, made, now)]
    found = []
    for part in sorted(pair[0].keys() | pair[1].keys()):
        full = f"{name}.{part}" if name else part
        found += _differences(full, pair[0].get(part, _NOTHING), pair[1].get(part, _NOTHING))
    return found


def _nearest(inputs: Mapping[str, Any], others: list[Needed]) -> Needed | None:
    """Of the entries of one stage the one most like ``inputs``: equal pictures or prompt, else a similar prompt."""

    def likeness(one: Needed) -> tuple[int, int]:
        same = [name for name, value in inputs.items() if one.inputs.get(name) == value]
        return sum(name in _TELLING and bool(inputs[name]) for name in same), len(same)

    best = max(others, key=likeness, default=None)
    if best is None or likeness(best)[0]:
        return best
    prompts = {str(one.inputs.get("prompt")): one for one in others}
    close = difflib.get_close_matches(str(inputs["prompt"]), prompts, 1) if "prompt" in inputs else []
    return prompts[close[0]] if close else None


def _shown(value: Any) -> str:
    """A JSON value with digests cut to what tells them apart."""
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, str):
        return f"{value[:12]}…" if _DIGEST.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(_shown(part) for part in value)}]"
    return json.dumps(value)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
