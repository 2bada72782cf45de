"""A run on the hub: its weights, card, pictures and settings in a folder that needs no network, then the upload.

What is shared is chosen here file by file: nothing else of the run's folder leaves the machine, and paths in the
settings are cut to their last name. Nothing in the repository is deleted. The token is huggingface_hub's own affair.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qflux.config import Config
from qflux.config_errors import is_path_key
from qflux.config_yaml import YamlProblem, parse, write_yaml
from qflux.errors import UserError
from qflux.io import atomic
from qflux.io.digests import xxh3
from qflux.io.faults import reach
from qflux.io.places import listed, refuse_file
from qflux.io.progress import say
from qflux.io.quiet import quiet_imports
from qflux.io.tensors import read_metadata
from qflux.io.written import noted
from qflux.models.adapters import WEIGHTS_FILE
from qflux.runtime.checkpoint import (
    drawn_weights,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    read_state,
    verify_checkpoint,
)
from qflux.runtime.run_folder import read_record, run_folders
from qflux.runtime.tracking import METRICS, read_metrics
from qflux.tools.card import write_card
from qflux.tools.card_call import example_call, sample_prompt
from qflux.tools.card_facts import HUB, CardFacts, find_base, is_folder, read_licence
from qflux.trainer.early import sample_name
from qflux.types import Family

CARD, SETTINGS, PICTURES, SHEET = "README.md", "training_config.yaml", "samples", "sheet.png"
WRITTEN = ".push.json"  # names of the files that the last push wrote into the folder
MOST_PICTURES = 8
_OURS = re.compile(rf"({PICTURES}/)?[\w-]+\.\w+")


@dataclass(frozen=True)
class HubFolder:
    """What is going to be shared: a folder and the files of it that belong to the push, relative, sorted."""

    path: Path
    files: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class _Source:
    """A run with the checkpoint to share; ``weights`` is where its shared weights lie (``ema/`` where it has some)."""

    run: Path
    checkpoint: Path
    weights: Path
    config: Config
    trainer: type[Any]

    @property
    def family(self) -> Family:
        """The trainer's."""
        return self.trainer.family


def push(
    run: Path,
    repo: str,
    import_trainer: Callable[[Config], type[Any]],
    *,
    out: Path | None = None,
    private: bool = True,
) -> str:
    """Write the folder to share and upload it to ``repo`` (OWNER/NAME); returns the repository's address.

    ``run`` is a run's folder (its newest checkpoint is shared) or a checkpoint in one, ``out`` the folder to write
    (default ``<run>/hub``). A repository that is there keeps its files and its visibility; a new one is private unless
    told otherwise. Raises UserError: no such checkpoint, not logged in, no right to write, hub out of reach.
    """
    check_repo(repo)
    try:
        hub = write_hub_folder(run, repo, import_trainer, out=out)
    except OSError as error:
        raise UserError(f"--out: cannot write {error.filename} ({error.strerror}); name another folder") from error
    say(f"{hub.path}: {len(hub.files)} files to share, {CARD} first")
    address = upload(hub, repo, private=private)
    say(f"pushed to {address}")
    return address


def newest_run(config: Config) -> Path:
    """The newest run folder of the config's project that has a checkpoint; UserError where none has."""
    root = Path(config.logging.output_dir) / config.logging.tracker_project_name
    found = [folder for folder in run_folders(root) if list_checkpoints(folder)]
    if not found:
        raise UserError(f"--push: found no run with a checkpoint in {root}; train first, or name one with --checkpoint")
    return found[-1]


def check_repo(repo: str) -> None:
    """UserError where ``repo`` is not OWNER/NAME in the hub's spelling."""
    with quiet_imports():
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push: {repo!r} is no repository id: {' '.join(str(error).split())}") from None
    if repo.count("/") != 1:
        raise UserError(f"--push: found {repo!r}, expected OWNER/NAME, for example your-name/{repo}")


def write_hub_folder(
    run: Path, repo: str, import_trainer: Callable[[Config], type[Any]], *, out: Path | None = None
) -> HubFolder:
    """Weights, pictures, settings and, last, the card; complete without network. See ``push`` for the arguments."""
    source = _source(Path(run), import_trainer)
    folder = out if out is not None else source.run / "hub"
    weights = _weight_files(source)
    drawn_at, pictures, sheet = _pictures(source)
    drawn = [path for _, path in pictures]
    comfyui = _comfyui_export(source)
    copies = {**weights, **{f"{PICTURES}/{path.name}": path for path in [*drawn, *([sheet] if sheet else [])]}}
    if comfyui is not None:
        copies[comfyui.name] = comfyui
    files = sorted([*copies, SETTINGS, CARD])
    _refuse_others(folder, files)
    reach("push.before")
    atomic.write_json(folder / WRITTEN, files)
    for name, path in copies.items():
        _copy(path, folder / name)
    _verify(source, folder, weights)
    atomic.write_text(folder / SETTINGS, shared_settings(source.config))
    facts = _facts(source, repo, comfyui.name if comfyui else None)
    facts = replace(
        facts,
        pictures=[(f"{PICTURES}/{path.name}", sample_prompt(source.config, i)) for i, path in pictures],
        sheet=f"{PICTURES}/{sheet.name}" if sheet else None,
        drawn_at=drawn_at,
        call=example_call(source.trainer, source.config, drawn),
    )
    atomic.write_text(folder / CARD, write_card(facts, source.config, source.family))
    reach("push.after")
    what = "adapter" if source.config.model.lora is not None else source.family.denoiser
    return HubFolder(folder, tuple(files), f"{what} after {facts.step} steps")


def _source(path: Path, import_trainer: Callable[[Config], type[Any]]) -> _Source:
    path = path.resolve()
    if (path / "manifest.json").is_file():
        problems = verify_checkpoint(path)
        if problems:
            raise UserError(*problems)
        checkpoint: Path | None = path
    else:
        checkpoint = find_checkpoint(path) if path.is_dir() else None
    if checkpoint is None:
        raise UserError(f"--push: found no checkpoint at {path}, expected a run's folder or a checkpoint in one")
    config = _config(checkpoint.parent)
    return _Source(checkpoint.parent, checkpoint, drawn_weights(checkpoint), config, import_trainer(config))


def _config(run: Path) -> Config:
    """The run's resolved config; files it names may have gone since."""
    file = run / "config.yaml"
    try:
        return Config.model_validate(parse(file.read_text(encoding="utf-8")).value)
    except OSError:
        raise UserError(f"--push: {file} is missing; name a checkpoint inside its run's folder") from None
    except (YamlProblem, ValidationError, UnicodeDecodeError):
        raise UserError(f"--push: {file} is not the config of a run of this version; it was altered") from None


def _weight_files(source: _Source) -> dict[str, Path]:
    """Name in the repository → file: the adapter, or the network's folder."""
    if source.config.model.lora is not None:
        return {WEIGHTS_FILE: source.weights / WEIGHTS_FILE}
    name = source.family.denoiser
    files = sorted((source.weights / name).iterdir())
    return {
        f"{name}/{path.name}": path for path in files if path.is_file() and path.suffix in (".json", ".safetensors")
    }


def _pictures(source: _Source) -> tuple[int, list[tuple[int, Path]], Path | None]:
    """(step, [(sample's number, picture)], sheet) of the last validation up to the checkpoint; step 0 shows nothing."""
    step = read_state(source.checkpoint).step
    for number, folder in reversed(_validations(source.run)):
        count = len(source.config.logging.validation.samples)
        named = [(i, folder / f"{sample_name(i)}.png") for i in range(count)]
        found = [(i, path) for i, path in named if path.is_file()][:MOST_PICTURES]
        sheet = folder / SHEET
        if 0 < number <= step and found:
            return number, found, sheet if sheet.is_file() else None
    return step, [], None


def _validations(run: Path) -> list[tuple[int, Path]]:
    folders = (path for path in (run / PICTURES).glob("step-*") if path.is_dir() and path.name[5:].isdecimal())
    return sorted((int(path.name[5:]), path) for path in folders)


def _comfyui_export(source: _Source) -> Path | None:
    """The same adapter as ``--export comfyui`` wrote it beside the checkpoint's; None where there is none."""
    export = source.weights / f"{Path(WEIGHTS_FILE).stem}_comfyui.safetensors"
    if source.config.model.lora is None or not export.is_file():
        return None
    of, mine = read_metadata(export), read_metadata(source.weights / WEIGHTS_FILE)
    same = all(of.get(key) == mine.get(key) for key in ("steps", "data_digest", "base_model"))
    return export if same else None


def _refuse_others(folder: Path, files: list[str]) -> None:
    """A folder with files in it that no push has noted is somebody's: nothing is written there, let alone uploaded."""
    refuse_file(folder, "--out", "name an empty one, or none for one in the run's folder")
    ours = noted(folder / WRITTEN)
    for name in ours - set(files):  # an earlier push's, and of no use any more
        if _OURS.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
    parts = {name.rpartition("/")[0] for name in files}  # "" is the folder itself
    others = []
    for part in sorted(parts):
        atomic.sweep(folder / part)
        names = [f"{part}/{name}".lstrip("/") for name in _names(folder / part)]
        others += [name for name in names if name not in ours & {*files} and name not in (*parts, WRITTEN)]
    if others:
        raise UserError(f"--out: {folder} holds files that are not of this push: {listed(others, 3)}; move them away")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _copy(path: Path, target: Path) -> None:
    with atomic.atomic_path(target, path.stat().st_size) as temporary:
        shutil.copyfile(path, temporary)


def _verify(source: _Source, folder: Path, weights: dict[str, Path]) -> None:
    """The copies are the checkpoint's bytes: a run that is still alive may have rotated it meanwhile."""
    listed = read_manifest(source.checkpoint)["files"]
    for name, path in weights.items():
        entry = listed.get(path.relative_to(source.checkpoint).as_posix())
        if entry is None or xxh3(folder / name) != entry["xxh3"]:
            raise UserError(f"--push: {folder / name} is not what {source.checkpoint.name} holds; run it again")


def shared_settings(config: Config) -> str:
    """The resolved config as YAML with every path of this machine cut to its last name."""
    tree = config.model_dump(mode="json")
    model = tree["model"]
    if is_folder(model["pretrained_model_name_or_path"]):
        model["pretrained_model_name_or_path"] = find_base(config.model).name
    return f"# The run's settings; of paths only the last name is kept.\n{write_yaml(_without_paths(tree, ()))}"


def _without_paths(node: Any, key: tuple[str | int, ...]) -> Any:
    if isinstance(node, dict):
        return {name: _without_paths(value, (*key, name)) for name, value in node.items()}
    if isinstance(node, list):
        return [_without_paths(value, (*key, index)) for index, value in enumerate(node)]
    return Path(node).name or "." if isinstance(node, str) and is_path_key(key) else node


def _facts(source: _Source, repo: str, comfyui: str | None) -> CardFacts:
    """What checkpoint and run say, without pictures and call."""
    state = read_state(source.checkpoint)
    network, info = None, {}
    if source.config.model.lora is None:
        weights = source.family.denoiser
        network = json.loads((source.weights / weights / "config.json").read_text(encoding="utf-8"))["_class_name"]
    else:
        weights = WEIGHTS_FILE
        info = read_metadata(source.weights / WEIGHTS_FILE)
    record = read_record(source.run) or {}
    lines = [line for line in read_metrics(source.run / METRICS) if line["step"] <= state.step]
    losses = [(line["step"], line["val_loss"]) for line in lines if isinstance(line.get("val_loss"), float)]
    base = find_base(source.config.model)
    return CardFacts(
        repo=repo,
        base=base,
        licence=read_licence(base),
        weights=weights,
        step=state.step,
        samples=state.samples,
        batch=state.batch,
        network=network,
        averaged=source.weights != source.checkpoint,
        comfyui=comfyui,
        held_out=losses[-1] if losses else None,
        digest=info.get("data_digest") or record.get("data") or "",
        version=info.get("qflux_version") or (record.get("versions") or {}).get("qflux") or "",
    )


def upload(hub: HubFolder, repo: str, *, private: bool = True) -> str:
    """Make the repository where it is missing and upload the push's files; returns its address.

    Raises UserError in one line, and one with the command that does it by hand: the folder stays whatever happens.
    """
    with quiet_imports():
        import huggingface_hub
        from huggingface_hub.utils import httpx
    shown = " --private" if private else ""
    by_hand = f"all is in {hub.path}; by hand: hf upload {repo} {shlex.quote(str(hub.path))} .{shown}"
    if huggingface_hub.get_token() is None:
        raise UserError("--push: not logged in to the hub; log in once with `hf auth login`", by_hand)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=hub.path,
            allow_patterns=list(hub.files),
            commit_message=f"{hub.what}, trained with qflux",
        )
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--push: {_reason(error, repo)}", by_hand) from error
    return f"{HUB}/{repo}"


def _reason(error: Exception, repo: str) -> str:
    """What went wrong between us and the hub, in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    said = " ".join(str(error).split())[:200]
    if isinstance(error, (ValueError, RuntimeError)) and not isinstance(error, HfHubHTTPError):
        return f"the upload failed ({said})"
    if not isinstance(error, HfHubHTTPError):
        return f"the hub is out of reach ({said}); go online and try again"
    status = error.response.status_code
    if status == 401:
        return "the hub does not accept the login (token wrong or expired); log in again with `hf auth login`"
    if status == 403:
        return f"no right to write to {repo}; take a repository of your own, or a token with write access"
    if status == 404:
        return f"the hub has no {repo} that you can see, or no such owner; check the name"
    return f"the hub refused it ({status}: {said})"
