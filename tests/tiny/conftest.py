"""A project on the tiny model for each test, every family on its random model; data, cache and models are made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import project, shared_cache, tiny_data  # noqa: F401 (fixtures)

from qflux.config import load_config
from qflux.demo import DEMOS
from qflux.io.quiet import quiet_imports
from qflux.main import import_trainer
from qflux.validation import oracle


def _write_kontext(folder: Path) -> None:
    """The random Kontext with a VAE whose shift and scale are not 0 and 1: forgotten, they show."""
    from qflux.demo import tiny_models as tiny

    with tiny.seeded(0):
        vae = tiny.make_vae(tiny.RANDOM, shift_factor=0.1159, scaling_factor=0.3611)
        tiny.save_kontext(folder, tiny.livened(tiny.make_transformer(tiny.RANDOM)), vae, tiny.RANDOM)


def _write(name: str, folder: Path) -> None:
    """Write the model ``name``: a demo's, or one that differs from its demo in an option."""
    from qflux.demo import tiny_flux2, tiny_models, tiny_qwen

    others: dict[str, Callable[[Path], Any]] = {
        "flux_kontext": _write_kontext,
        "flux_schnell": partial(tiny_models.build_flux_random, guidance=False),
        "flux2_klein_distilled": partial(tiny_flux2.build_flux2_klein_random, distilled=True),
        "qwen_image_edit_plus_2511": partial(tiny_qwen.build_qwen_image_edit_plus_random, zero_cond_t=True),
    }
    (others[name] if name in others else DEMOS[name].write_model)(folder)


_FAMILY = {
    "flux_schnell": "flux",
    "flux2_klein_distilled": "flux2_klein",
    "qwen_image_edit_plus_2511": "qwen_image_edit_plus",
}


class Tiny:
    """One family's trainer on a random model, in fp32; files and components are made at their first use.

    name  of a demo, or ``flux_schnell``, ``flux2_klein_distilled``, ``qwen_image_edit_plus_2511``
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    @cached_property
    def config_file(self) -> Path:
        """A config of 96 x 64 targets; the model is beside it."""
        _write(self.name, self.folder / "model")
        demo = DEMOS[_FAMILY.get(self.name, self.name)]
        length = "max_sequence_length: 64, " if demo.cuts else ""
        path = self.folder / "run.yaml"
        path.write_text(
            "model: {pretrained_model_name_or_path: ./model}\n"
            f"data: {{dataset_path: data, {length}target_size: [96, 64]}}\n"
            f'train: {{trainer: {demo.trainer}, mixed_precision: "no", guidance_scale: 2.5}}\n'
            "cache: {cache_dir: cache}\n"
        )
        return path

    def make(self, *overrides: str) -> Any:
        """A trainer with changes of the config."""
        config = load_config(self.config_file, overrides)
        made = import_trainer(config)
        return made(config, self.folder / "model", dtype=torch.float32, device=torch.device("cpu"))

    @cached_property
    def trainer(self) -> Any:
        """The trainer of the plain config."""
        return self.make()

    @cached_property
    def components(self) -> dict[str, Any]:
        """All components as the trainer loads them; tests leave them as they are."""
        return oracle.load_components(self.trainer)

    @cached_property
    def official(self) -> dict[str, Any]:
        """The components as a user of the official pipeline has them: whole text encoder, official processor."""
        return self.components | _official_parts(self.trainer, self.components)


def _official_parts(trainer: Any, components: dict[str, Any]) -> dict[str, Any]:
    """Official classes in the place of what the trainer loads otherwise.

    Processors are made bare, because their constructors ask for torchvision; their own code runs.
    """
    with quiet_imports():
        import transformers as library
    folder, encoder = trainer.folder, type(components["text_encoder"])
    if "processor" in components:
        tokenizer = library.Qwen2Tokenizer.from_pretrained(folder, subfolder="processor")
        bare = library.Qwen2VLProcessor.__new__(library.Qwen2VLProcessor)
        bare.image_processor = library.Qwen2VLImageProcessorPil.from_pretrained(folder, subfolder="processor")
        bare.tokenizer, bare.video_processor, bare.chat_template = tokenizer, None, None
        for kind in ("image", "video"):
            mark = f"<|{kind}_pad|>"
            setattr(bare, f"{kind}_token", mark)
            setattr(bare, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(mark))
            setattr(bare, f"{kind}_ids", [tokenizer.convert_tokens_to_ids(mark)])
        bare.audio_ids = []
        return {"processor": bare}
    if trainer.family.name.startswith("flux2"):
        return {"text_encoder": encoder.from_pretrained(folder, subfolder="text_encoder").eval()}
    return {}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """``tiny(name)``: a family's random model and its trainer."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            made[name] = Tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
