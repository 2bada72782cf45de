"""Components of a model folder: where they are, what exactly they are, and loading them one at a time.

A model is a folder as ``save_pretrained`` of a pipeline leaves it: ``model_index.json`` and one folder a component.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qflux.errors import UserError
from qflux.io.digests import blake3_file, blake3_json
from qflux.io.places import listed, local_folder
from qflux.io.quiet import quiet_imports
from qflux.models.model_folder import KEY, folder_problems, pickled_only, read_config, read_index

if TYPE_CHECKING:
    from qflux.io.digests import DigestMemo

_IDENTITY_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_HUB_ID = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(mixed_precision: str) -> torch.dtype:
    """The frozen base's dtype for a value of ``train.mixed_precision``: no | bf16 | fp16."""
    try:
        return _DTYPES[mixed_precision]
    except KeyError:
        raise UserError(f"train.mixed_precision: {mixed_precision!r}; expected one of {', '.join(_DTYPES)}") from None


def resolve_model(name_or_path: str | Path, revision: str | None = None, components: Sequence[str] = ()) -> Path:
    """The local folder of a model: a folder as it is, else a hub id, of which only what is needed is fetched.

    ``components`` names the component folders that are needed; none named means all of them.
    Raises UserError for a folder that lacks one, and for a hub model that is gated, missing or out of reach.
    """
    text = str(name_or_path)
    folder = local_folder(text)
    if folder is None:
        if not _HUB_ID.fullmatch(text):
            raise UserError(f"{KEY}: no folder {text}, and this is not a hub id (owner/name) either")
        folder = _download(text, revision, components)
    problems = folder_problems(folder, components, name_or_path)
    if problems:
        raise UserError(*problems)
    return folder


def _download(name: str, revision: str | None, components: Sequence[str]) -> Path:
    with quiet_imports():
        import huggingface_hub
        from huggingface_hub import errors

    folders = components or ("*",)
    patterns = ["model_index.json", *(f"{folder}/*{suffix}" for folder in folders for suffix in _IDENTITY_SUFFIXES)]
    page, at = f"https://huggingface.co/{name}", f"{KEY}: {name}"
    try:
        path = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*.fp16.safetensors", "*.non_ema.*"]
        )
    except errors.GatedRepoError:
        raise UserError(f"{at} is gated; accept its terms on {page} and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{at} has no revision {revision!r}; see {page}/commits") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{at} is neither a local folder nor a model on the hub; check {page}; if it is private, `hf auth login`"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{at} is not in the local cache and the hub is out of reach; go online, see {page}, or give a local "
            "folder; if it is gated or private, `hf auth login`"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{at} could not be fetched ({reason}); see {page}; if it is private, `hf auth login`"
        ) from None
    return Path(path)


def component_identity(folder: Path, component: str, memo: DigestMemo | None = None) -> str:
    """Digest of everything that decides what a component computes: weights shards, configs, tokenizer files.

    Names are relative to the component's folder, so that a copied or renamed model keeps its identity.
    """
    root = folder / component
    refuse_pickles(root)
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in _IDENTITY_SUFFIXES)
    if not files:
        raise UserError(f"{KEY}: {root} holds no weights, config or tokenizer file")
    return blake3_json({path.relative_to(root).as_posix(): blake3_file(path, memo) for path in files})


def model_identity(folder: Path, components: Sequence[str], memo: DigestMemo | None = None) -> str:
    """Digest of several components together; their order does not matter."""
    return blake3_json({name: component_identity(folder, name, memo) for name in sorted(components)})


def refuse_pickles(root: Path) -> None:
    """UserError where a component's weights are there only in a format that can run code when opened."""
    if not root.is_dir():
        raise UserError(f"{KEY}: no component folder {root}")
    problem = pickled_only(root)
    if problem:
        raise UserError(f"{KEY}: {problem}")


def load_module(cls: type, folder: Path, component: str, dtype: torch.dtype, **options: Any) -> Any:
    """Load one component with ``cls.from_pretrained``: safetensors only, in ``dtype``, eval mode, frozen, offline.

    ``cls`` is a class of diffusers or transformers; ``options`` go to ``from_pretrained`` as they are.
    Raises UserError where the folder is not one of ``cls`` or its files lack weights, which would else be random.
    """
    refuse_pickles(folder / component)
    with quiet_libraries(), readable(folder / component, cls):
        module, found = cls.from_pretrained(  # type: ignore[attr-defined]
            folder,
            subfolder=component,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    lost = sorted(str(name) for name in found["missing_keys"])
    if lost:
        raise UserError(f"{KEY}: {folder / component} lacks the weights {listed(lost, 3)} of {cls.__name__}")
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def readable(root: Path, cls: type) -> Iterator[None]:
    """Whatever a library raises on a broken or foreign folder becomes one line about it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{KEY}: {root} cannot be loaded as {cls.__name__}: {reason}") from error


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' own progress bars and notes: while a component loads, while a picture is drawn."""
    with quiet_imports():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = [logger.is_progress_bar_enabled() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level, bar in zip(loggers, levels, bars, strict=True):
            logger.set_verbosity(level)
            if bar:
                logger.enable_progress_bar()


def free(*modules: Any) -> None:
    """Give the memory of modules back, whoever still holds a reference: they are empty shells afterwards."""
    for module in modules:
        if not isinstance(module, torch.nn.Module):
            continue
        for part in module.modules():
            part._parameters.clear()
            part._buffers.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_plain(cls: type, folder: Path, component: str) -> Any:
    """Load a component that is no network: a tokenizer, an image processor or a scheduler."""
    # left out, an Auto class would ask on the terminal whether to run a stranger's code
    own = {"trust_remote_code": False} if cls.__module__.startswith("transformers") else {}
    with quiet_libraries(), readable(folder / component, cls):
        part = cls.from_pretrained(folder, subfolder=component, local_files_only=True, **own)  # type: ignore[attr-defined]
    vocabulary = part.get_vocab() if hasattr(part, "get_vocab") else None
    if vocabulary is not None and len(vocabulary) <= len(part.added_tokens_decoder):
        raise UserError(f"{KEY}: {folder / component} has no vocabulary; fetch the tokenizer's files again")
    encoder = component.replace("tokenizer", "text_encoder")
    if vocabulary is not None and encoder != component and (folder / encoder).is_dir():
        config, last = read_config(folder, encoder), max(vocabulary.values())
        inner = config.get("text_config")
        size = (inner if isinstance(inner, dict) else config).get("vocab_size", last + 1)
        if not isinstance(size, int) or last >= size:
            raise UserError(
                f"{KEY}: {folder / component} has a token {last}, expected at most {size} tokens, the vocab_size of "
                f"{folder / encoder}; fetch the tokenizer's files again"
            )
    return part


def pipeline_options(folder: Path, pipeline_class: type) -> dict[str, Any]:
    """What ``model_index.json`` says of a pipeline besides its components, in words of its constructor."""
    index = read_index(folder)
    words = inspect.signature(pipeline_class).parameters
    return {name: value for name, value in index.items() if name in words and not isinstance(value, list)}


def meta_module(folder: Path, component: str) -> torch.nn.Module | None:
    """A component's structure without weights; None where its class is not one of diffusers'."""
    return meta_network(read_config(folder, component))


def meta_network(config: Mapping[str, Any]) -> torch.nn.Module | None:
    """The network of a diffusers config on the meta device; None where ``_class_name`` is no network of diffusers."""
    with quiet_imports():
        import diffusers
    found = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        return None
    cls: Any = found
    with quiet_libraries(), torch.device("meta"):
        return cls.from_config(dict(config))
