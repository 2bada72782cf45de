from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qflux.trainer
from qflux.errors import UserError
from qflux.models.structures import entry_bytes, meta_transformer, structures

DATA = Path(qflux.trainer.__file__).parent
FOLDERS = ("flux", "qwen_image", "flux2")
# Parameters of the published weights' networks.
PARAMETERS = {
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "black-forest-labs/FLUX.1-Kontext-dev": 11_901_408_320,
    "Qwen/Qwen-Image": 20_430_401_088,
    "Qwen/Qwen-Image-2512": 20_430_401_088,
    "Qwen/Qwen-Image-Edit": 20_430_401_088,
    "Qwen/Qwen-Image-Edit-2509": 20_430_401_088,
    "Qwen/Qwen-Image-Edit-2511": 20_430_401_088,
    "black-forest-labs/FLUX.2-dev": 32_223_281_152,
    "black-forest-labs/FLUX.2-klein-9B": 9_078_581_248,
    "black-forest-labs/FLUX.2-klein-base-9B": 9_078_581_248,
    "black-forest-labs/FLUX.2-klein-4B": 3_875_544_576,
    "black-forest-labs/FLUX.2-klein-base-4B": 3_875_544_576,
}


def real_models():
    return {hub: entry for name in FOLDERS for hub, entry in structures(DATA / name).items()}


def test_every_real_model_is_described():
    assert real_models().keys() == PARAMETERS.keys()


@pytest.mark.parametrize("hub", PARAMETERS)
def test_a_meta_instance_has_the_real_models_parameters(hub):
    structure = real_models()[hub]
    model = meta_transformer(structure["transformer"])
    parameters = list(model.parameters())
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[hub]
    stated = structure["transformer"]
    assert {key: list(v) if isinstance(v := model.config[key], tuple) else v for key in stated if key[0] != "_"} == {
        key: value for key, value in stated.items() if key[0] != "_"
    }


@pytest.mark.parametrize("hub", PARAMETERS)
def test_text_and_latents_fit_the_network(hub):
    structure = real_models()[hub]
    config, latents = structure["transformer"], structure["latents"]
    assert structure["text"]["prompt_embeds"] == ["L", config["joint_attention_dim"]]
    assert structure["text"].get("pooled_prompt_embeds", [config.get("pooled_projection_dim")]) == [
        config.get("pooled_projection_dim")
    ]
    patch = 16 // latents["scale"]  # a predicted position covers 16 pixels in all of them
    assert latents["channels"] * patch**2 == config["in_channels"]


def test_only_one_edit_model_conditions_references_at_time_zero():
    zero = [hub for hub, entry in real_models().items() if entry["transformer"].get("zero_cond_t")]
    assert zero == ["Qwen/Qwen-Image-Edit-2511"]


@pytest.mark.parametrize(
    ("hub", "target", "controls", "length", "expected"),
    [
        ("black-forest-labs/FLUX.1-dev", (512, 768), [], 512, 16 * 64 * 96 + 512 * 4096 + 768),
        ("Qwen/Qwen-Image-Edit", (1024, 1024), [(512, 512)], 200, 16 * (128 * 128 + 64 * 64) + 200 * 3584),
        ("black-forest-labs/FLUX.2-dev", (1024, 512), [(256, 256)] * 2, 512, 128 * (2048 + 2 * 256) + 512 * 15360),
    ],
)
def test_entry_bytes_are_those_of_the_tensors(hub, target, controls, length, expected):
    structure = real_models()[hub]
    assert entry_bytes(structure, target, controls, length, dtype_bytes=2) == 2 * expected
    channels, scale = structure["latents"]["channels"], structure["latents"]["scale"]
    sizes = [target, *controls]
    tensors = [torch.empty(channels, height // scale, width // scale, device="meta") for height, width in sizes]
    tensors += [torch.empty([length if n == "L" else n for n in s], device="meta") for s in structure["text"].values()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert entry_bytes(structure, target, controls, length, dtype_bytes=4) == total


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"structures\.json: missing"):
        structures(tmp_path)
    with pytest.raises(UserError, match="no network class 'Nonsense'"):
        meta_transformer({"_class_name": "Nonsense"})
