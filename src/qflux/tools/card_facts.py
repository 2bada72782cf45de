"""What a model card is made from, and where base model and licence are looked up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qflux.config import ModelConfig
from qflux.io.quiet import quiet_imports
from qflux.types import Size

HUB = "https://huggingface.co"
UNKNOWN_LICENCE = "same-as-base"
_CARD = "README.md"
_CACHED = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
_SECONDS = 10.0  # to wait for the hub's answer


@dataclass(frozen=True)
class Base:
    """The base model: its hub id, or None and a local folder's last name; ``folder`` where it is on this machine."""

    name: str
    hub_id: str | None = None
    revision: str | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Licence:
    """The base model's licence as its own card names it; ``known`` is False where that could not be read."""

    id: str = "other"
    name: str | None = None
    link: str | None = None
    known: bool = False


@dataclass(frozen=True)
class Call:
    """What the pipeline was called with to draw validation sample ``index`` (0: also where there is none).

    arguments  name → plain value · pictures  the argument that takes the controls, a list of them where ``listed``
    controls   (H, W) of each control · framed  whether one was cut to the frame of the picture that is drawn
    extended   what qflux gave the pipeline that it does not take by itself
    """

    prompt: str = ""
    index: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pictures: str | None = None
    listed: bool = False
    controls: tuple[Size, ...] = ()
    extended: tuple[str, ...] = ()
    framed: bool = False


@dataclass(frozen=True)
class CardFacts:
    """All that a card says besides config and family.

    weights   file of the adapter, or folder of the whole network, in the repository
    network   class of the whole network; None for an adapter
    step, samples, batch   optimizer steps, samples seen, samples of one step
    pictures  (path in the repository, prompt) of validation pictures, drawn at step ``drawn_at``
    sheet     their contact sheet · comfyui  the adapter in ComfyUI's form; paths in the repository, or None
    held_out  (step, loss) of the last measurement · digest  of the training data
    """

    repo: str
    base: Base
    licence: Licence
    weights: str
    step: int
    samples: int
    batch: int
    network: str | None = None
    averaged: bool = False
    pictures: Sequence[tuple[str, str]] = ()
    sheet: str | None = None
    drawn_at: int = 0
    comfyui: str | None = None
    call: Call = Call()
    held_out: tuple[int, float] | None = None
    digest: str = ""
    version: str = ""


def find_base(model: ModelConfig) -> Base:
    """The base model of a config; a folder inside the hub's cache has a hub id and a commit."""
    name = model.pretrained_model_name_or_path
    cached = _CACHED.search(name)
    if cached:
        owner, repo, commit = cached.groups()
        return Base(repo, f"{owner}/{repo}", commit, Path(name))
    if is_folder(name):
        return Base(Path(name).name or "model", folder=Path(name))
    return Base(name, name, model.revision)


def is_folder(name: str) -> bool:
    """Whether a resolved config's model is a folder of this machine (there it is absolute), not a hub id."""
    return Path(name).is_absolute()


def read_licence(base: Base) -> Licence:
    """The licence of the base model's own card: in its folder, in the hub's local cache, or asked from the hub.

    Unknown, with the hub's words for that, where none of them tells; never raises for a hub out of reach.
    """
    data = _card_data(base)
    found = data.get("license")
    name, link = data.get("license_name"), data.get("license_link")
    if isinstance(found, list):
        found = found[0] if found else None
    if not isinstance(found, str) or not found:
        return Licence(name=UNKNOWN_LICENCE, link=f"{HUB}/{base.hub_id}" if base.hub_id else None)
    return Licence(found, str(name) if name else None, _absolute_link(base, link), known=True)


def _absolute_link(base: Base, link: Any) -> str | None:
    """A link to a file of the base model's repository holds only there: make it lead there from anywhere."""
    if not isinstance(link, str) or not link:
        return None
    if re.match(r"https?://", link):
        return link
    return f"{HUB}/{base.hub_id}/blob/{base.revision or 'main'}/{link.removeprefix('./')}" if base.hub_id else None


def _card_data(base: Base) -> Mapping[str, Any]:
    if base.folder is not None and (base.folder / _CARD).is_file():
        return _front_matter(base.folder / _CARD)
    if base.hub_id is None:
        return {}
    with quiet_imports():
        import huggingface_hub
        from huggingface_hub.utils import httpx

        cached = huggingface_hub.try_to_load_from_cache(base.hub_id, _CARD, revision=base.revision)
        if isinstance(cached, str):
            return _front_matter(Path(cached))
        try:
            info = huggingface_hub.HfApi().model_info(base.hub_id, revision=base.revision, timeout=_SECONDS)
        except (httpx.HTTPError, OSError, ValueError):
            return {}
    return info.card_data.to_dict() if info.card_data is not None else {}


def _front_matter(path: Path) -> Mapping[str, Any]:
    """YAML at the head of a card; empty where there is none or it is broken."""
    import yaml

    with quiet_imports():
        from huggingface_hub import ModelCard

        try:
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            return {}
