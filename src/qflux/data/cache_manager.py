"""The cache of encoded samples. It cannot lie: an entry's name is the digest of everything that made it.

Layout: ``<root>/<stage>/<first two digits of the key>/<key>.safetensors``. An image stage's key covers the target, the
controls, the mask and the size plan; a text stage's key the prompt (so equal prompts are one entry) and, where the text
encoder sees them, the controls. Both cover the stage, its recipe (weights, dtype, options) and the schema. Names and
ids of samples are in no key. Each entry's metadata holds its inputs and its recipe as JSON, and its content is checked
on every read (see :mod:`qflux.data.entry`).

The encoders come in as functions; nothing here knows a model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from qflux.data import entry
from qflux.data.entry import CacheDamaged, read_entry
from qflux.errors import UserError
from qflux.io import atomic, digests, locks
from qflux.io.faults import reach
from qflux.io.progress import Progress
from qflux.types import Crew, EditSample, EncodedSample, EncodeStage, SampleSpec

__all__ = ["SCHEMA", "CacheDamaged", "CacheManager", "CacheMiss", "CacheReport", "Load", "read_entry"]

SCHEMA = 1
SUFFIX = ".safetensors"
MARK = ".damaged"  # an empty file beside an entry that a reader found damaged: the next fill repairs it
_MOST_PROBLEMS = 8  # samples whose encoding failed before fill gives up
_AHEAD = 2  # samples decoded while one is encoded

Encode = Callable[[EditSample], EncodedSample]


class Load(Protocol):
    """Makes the sample at a position of the specs; without ``pixels`` no image need be decoded."""

    def __call__(self, index: int, pixels: bool = True, /) -> EditSample:
        """The sample at ``index``."""


class CacheMiss(UserError):
    """No entry for a sample: the cache is incomplete or stale."""


@dataclass
class CacheReport:
    """What :meth:`CacheManager.fill` did, in entries: every needed one is reused, encoded, repaired or left undone."""

    reused: int = 0
    encoded: int = 0
    repaired: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def line(self) -> str:
        """One readable line."""
        took = timedelta(seconds=round(self.seconds))
        end = "; interrupted, run it again to go on" if self.interrupted else ""
        return f"cache: {self.reused} reused, {self.encoded} encoded, {self.repaired} repaired in {took}{end}"


@dataclass
class _Survey:
    """Stage name → {key: position} of the entries to be made; those among them that were damaged; how many are good."""

    todo: dict[str, dict[str, int]]
    damaged: dict[str, bool] = field(default_factory=dict)
    reused: int = 0
    complete: bool = True

    @property
    def total(self) -> int:
        return sum(len(keys) for keys in self.todo.values())


class CacheManager:
    """The cache under ``root`` for a family's encode stages.

    ``recipes[stage.name]`` is everything besides the sample that made an entry: identity of each component's weights,
    dtype, posterior mode, text length, background colour, family, recipe version; plain JSON values.
    ``text_sees_controls`` says that text stages read the control images too.
    """

    def __init__(
        self,
        root: Path,
        stages: Sequence[EncodeStage],
        recipes: Mapping[str, Mapping[str, object]],
        *,
        text_sees_controls: bool,
        schema: int = SCHEMA,
    ) -> None:
        self.root = Path(root)
        self.stages = tuple(stages)
        self.text_sees_controls = text_sees_controls
        self.schema = schema
        self._filling = threading.Lock()  # reader threads that find damage repair it one after the other
        self.recipes = {stage.name: digests.canonical_json(recipes[stage.name]) for stage in stages}
        self._made_by = {
            stage.name: digests.blake3_json([schema, stage.name, stage.kind, self.recipes[stage.name]])
            for stage in stages
        }

    def inputs(self, stage: EncodeStage, spec: SampleSpec) -> dict[str, object]:
        """What of ``spec`` an entry of ``stage`` depends on; the key is its digest together with the recipe's."""
        if stage.kind == "text":
            if not self.text_sees_controls:
                return {"prompt": spec.prompt}
            sizes = [plan.as_json() for plan in (*spec.sizes.controls, *spec.sizes.text_controls)]
            return {"prompt": spec.prompt, "controls": list(spec.controls), "control_sizes": sizes}
        return {
            "target": spec.target,
            "controls": list(spec.controls),
            "mask": spec.mask,
            "target_size": spec.sizes.target.as_json(),
            "control_sizes": [plan.as_json() for plan in spec.sizes.controls],
        }

    def key(self, stage: EncodeStage, spec: SampleSpec) -> str:
        """The key (64 hex digits) of one stage's entry for ``spec``."""
        return digests.blake3_json([self._made_by[stage.name], self.inputs(stage, spec)])

    def keys(self, spec: SampleSpec) -> dict[str, str]:
        """Stage name → key of all entries that ``spec`` needs."""
        return {stage.name: self.key(stage, spec) for stage in self.stages}

    def path(self, stage: str, key: str) -> Path:
        """The file of an entry."""
        return self.root / stage / key[:2] / (key + SUFFIX)

    def missing(self, specs: Iterable[SampleSpec], *, verify: bool = False) -> dict[str, dict[str, int]]:
        """Stage name → {key: first position in ``specs`` that needs it} of entries that are missing or known damaged.

        ``verify`` also reads every entry that is there and counts damaged ones as missing.
        """
        return self._survey(specs, verify, lambda: False).todo

    def _survey(self, specs: Iterable[SampleSpec], verify: bool, stop: Callable[[], bool]) -> _Survey:
        needed: dict[str, dict[str, int]] = {stage.name: {} for stage in self.stages}
        for position, spec in enumerate(specs):
            for stage in self.stages:
                needed[stage.name].setdefault(self.key(stage, spec), position)
        survey = _Survey({name: {} for name in needed})
        listings: dict[str, set[str]] = {}
        count = sum(len(keys) for keys in needed.values())
        with Progress(count, "checking cache", enabled=verify) as bar:
            for stage_name, keys in needed.items():
                for key, position in keys.items():
                    if verify and stop():
                        survey.complete = False
                        return survey
                    self._judge(survey, listings, stage_name, key, position, verify)
                    bar.advance()
        return survey

    def _judge(
        self, survey: _Survey, listings: dict[str, set[str]], stage: str, key: str, position: int, verify: bool
    ) -> None:
        """Enter one key into the survey as good, missing or damaged."""
        path = self.path(stage, key)
        folder = f"{stage}/{key[:2]}"
        if folder not in listings:
            listings[folder] = _names(path.parent)
        there = path.name in listings[folder]
        damaged = there and path.name + MARK in listings[folder]
        if there and verify:
            damaged = not self._readable(path, stage, key)
        if there and not damaged:
            survey.reused += 1
            return
        survey.todo[stage][key] = position
        if damaged:
            survey.damaged[f"{stage}/{key}"] = True

    def _readable(self, path: Path, stage: str, key: str) -> bool:
        try:
            read_entry(path, stage, key)
        except (CacheDamaged, FileNotFoundError):
            return False
        with suppress(OSError):
            os.unlink(f"{path}{MARK}")
        return True

    def get(self, spec: SampleSpec) -> EncodedSample:
        """The encoded sample of ``spec``, its stages merged; tensors on the CPU in the encoders' dtypes.

        ``CacheMiss`` or ``CacheDamaged`` names the file and what to do; a damaged entry is marked, so that the next
        :meth:`fill` repairs it without a full verification.
        """
        parts = []
        for stage in self.stages:
            key = self.key(stage, spec)
            path = self.path(stage.name, key)
            try:
                parts.append(read_entry(path, stage.name, key)[0])
            except FileNotFoundError:
                found = f"no {stage.name} cache entry for sample {spec.id!r}"
                advice = "the cache is incomplete or its inputs changed; run --cache to make what is missing"
                raise CacheMiss(f"{path}: {found}: {advice}") from None
            except CacheDamaged:
                with suppress(OSError):
                    Path(f"{path}{MARK}").touch()
                raise
        return entry.merge(parts, spec.sizes)

    def fill(
        self,
        specs: Sequence[SampleSpec],
        load: Load,
        open_stage: Callable[[EncodeStage], AbstractContextManager[Encode]],
        *,
        verify: bool,
        stop: Callable[[], bool],
        crew: Crew | None = None,
        wait: float = 0.0,
    ) -> CacheReport:
        """Make every entry that ``specs`` need and the cache lacks; can be killed anywhere and run again.

        ``open_stage(stage)`` loads a stage's encoders, gives the encode function and frees them at its end; it is
        entered once for each stage that lacks an entry, one at a time. ``load(position, pixels)`` makes the sample (on
        one other thread, a little ahead); ``pixels`` is False where the stage reads only the prompt. ``verify`` reads
        what is there too. ``stop()`` is asked before each entry. Raises ``Locked`` when another process writes,
        for longer than ``wait`` seconds, ``NoSpace``, and ``UserError`` naming the samples that failed (up to a few;
        what was encoded is kept).

        With a ``crew`` all its processes call this with equal arguments and fill the cache side by side, each entry
        once: the first surveys and holds the lock for all, and all get the same report.
        """
        start = time.monotonic()
        with self._filling, ExitStack() as held:
            if crew is None or crew.processes == 1:
                survey = self._opened(specs, verify, stop, held, wait)
                report = self._filled(survey, specs, load, stop, open_stage)
            else:
                survey = _Survey(**crew.share(lambda: asdict(self._opened(specs, verify, stop, held, wait))))
                mine = replace(survey, todo={k: _dealt(v, crew) for k, v in survey.todo.items()}, reused=0)
                done = crew.gather(lambda: asdict(self._filled(mine, specs, load, stop, open_stage)))
                report = CacheReport(survey.reused, *(sum(part[k] for part in done) for k in ("encoded", "repaired")))
                report.interrupted = any(part["interrupted"] for part in done)
        report.seconds = time.monotonic() - start
        return report

    def _opened(
        self, specs: Sequence[SampleSpec], verify: bool, stop: Callable[[], bool], held: ExitStack, wait: float
    ) -> _Survey:
        """What is to be made; the cache is locked when that is anything."""
        survey = self._survey(specs, verify, stop)
        if survey.complete and survey.total:
            self._refuse_read_only(survey)
            held.enter_context(locks.hold(self.root / ".lock", f"the cache {self.root}", wait))
            self._sweep()
            survey = self._survey_again(survey)
        return survey

    def _refuse_read_only(self, survey: _Survey) -> None:
        if not self.root.is_dir() or os.access(self.root, os.W_OK):
            return
        stage, key = next((stage, key) for stage, keys in survey.todo.items() for key in keys)
        bad = len(survey.damaged)
        raise UserError(
            f"cache.cache_dir: found {self.root}, which cannot be written, with {bad} damaged and {survey.total - bad} "
            f"missing entries, the first {self.path(stage, key)}; they cannot be repaired there: let it be written, or "
            "copy it to a folder that can be and name that"
        )

    def _filled(
        self,
        survey: _Survey,
        specs: Sequence[SampleSpec],
        load: Load,
        stop: Callable[[], bool],
        open_stage: Callable[[EncodeStage], AbstractContextManager[Encode]],
    ) -> CacheReport:
        report = CacheReport(survey.reused, interrupted=not survey.complete)
        if survey.complete and survey.total:
            with Progress(survey.total, "caching") as bar:
                _Filling(self, specs, load, stop, survey, report, bar).run(open_stage)
        return report

    def _survey_again(self, survey: _Survey) -> _Survey:
        """With the lock held: drop what another process made since, judged by existence, damaged ones by reading."""
        again = _Survey({name: {} for name in survey.todo}, reused=survey.reused)
        for stage, keys in survey.todo.items():
            listings: dict[str, set[str]] = {}
            for key, position in keys.items():
                verify = f"{stage}/{key}" in survey.damaged
                self._judge(again, listings, stage, key, position, verify)
        return again

    def _sweep(self) -> None:
        atomic.sweep(self.root, alone=True)  # only digests.json is written without the lock, and may be lost
        for stage in self.stages:
            folder = self.root / stage.name
            for part in sorted(folder.iterdir()) if folder.is_dir() else ():
                atomic.sweep(part, alone=True)

    def write(self, stage: EncodeStage, spec: SampleSpec, encoded: EncodedSample) -> None:
        """Write one stage's entry for ``spec``; ``UserError`` naming the sample when it is not finite or not whole."""
        named = entry.to_tensors(encoded)
        wrong = entry.problems(stage, spec, named)
        if wrong:
            raise UserError(*(f"sample {spec.id!r}: stage {stage.name} {line}; nothing was cached" for line in wrong))
        key = self.key(stage, spec)
        metadata = {
            "inputs": digests.canonical_json(self.inputs(stage, spec)),
            "key": key,
            "recipe": self.recipes[stage.name],
            "schema": str(self.schema),
            "stage": stage.name,
        }
        path = self.path(stage.name, key)
        reach("entry.before")
        atomic.write_bytes(path, entry.pack(named, metadata))
        reach("entry.after")
        with suppress(FileNotFoundError):
            os.unlink(f"{path}{MARK}")


def _dealt(keys: Mapping[str, int], crew: Crew) -> dict[str, int]:
    """This process's share of the entries to be made."""
    return dict(list(keys.items())[crew.rank :: crew.processes])


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


@dataclass
class _Filling:
    """One run of :meth:`CacheManager.fill` under the lock."""

    manager: CacheManager
    specs: Sequence[SampleSpec]
    load: Load
    stop: Callable[[], bool]
    survey: _Survey
    report: CacheReport
    bar: Progress
    problems: list[str] = field(default_factory=list)
    refused: int = 0

    def run(self, open_stage: Callable[[EncodeStage], AbstractContextManager[Encode]]) -> None:
        """Encode stage by stage; at the end one ``UserError`` with all refused samples."""
        for stage in self.manager.stages:
            todo = self.survey.todo[stage.name]
            if not todo or self.report.interrupted or self.refused >= _MOST_PROBLEMS:
                continue
            if self.stop():
                self.report.interrupted = True
                continue
            pool = ThreadPoolExecutor(1, "cache-load")
            try:
                with open_stage(stage) as encode:
                    self._stage(stage, list(todo.items()), encode, pool)
            finally:
                pool.shutdown(cancel_futures=True)
        if self.problems:
            raise UserError(*self.problems)

    def _stage(self, stage: EncodeStage, todo: list[tuple[str, int]], encode: Encode, pool: ThreadPoolExecutor) -> None:
        pixels = stage.kind == "image" or self.manager.text_sees_controls
        ahead: list[Future[EditSample]] = []
        for number, (key, position) in enumerate(todo):
            if self.stop():
                self.report.interrupted = True
                return
            for _, later in todo[number + len(ahead) : number + 1 + _AHEAD]:
                ahead.append(pool.submit(self.load, later, pixels))
            try:
                self.manager.write(stage, self.specs[position], encode(ahead.pop(0).result()))
            except UserError as error:
                self.problems += error.problems
                self.refused += 1
                if self.refused >= _MOST_PROBLEMS:
                    return
            else:
                self._count(f"{stage.name}/{key}")
            self.bar.advance()

    def _count(self, name: str) -> None:
        if name in self.survey.damaged:
            self.report.repaired += 1
        else:
            self.report.encoded += 1
