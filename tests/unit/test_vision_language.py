"""Text and pictures for encoders that see: bit-equal to the official processors, made bare and called live."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from qflux.demo.tokenizers import mistral_tokenizer, qwen_tokenizer
from qflux.models.vision_language import ImageTextProcessor

MARK = "<|image_pad|>"
HOLE = f"<|vision_start|>{MARK}<|vision_end|>"
SIZES = [(112, 112), (60, 300), (420, 300), (31, 90)]


def picture(height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def ours():
    return ImageTextProcessor(qwen_tokenizer(), transformers.Qwen2VLImageProcessorPil(), MARK)


@pytest.fixture(scope="module", params=["Qwen2VLProcessor", "Qwen2_5_VLProcessor"])
def official(request, ours):
    """The official class without its constructor, which asks for torchvision."""
    kind = getattr(transformers, request.param)
    bare = kind.__new__(kind)
    bare.image_processor, bare.tokenizer = ours.image_processor, ours.tokenizer
    bare.video_processor = bare.chat_template = None
    for name in ("image", "video"):
        mark = f"<|{name}_pad|>"
        number = ours.tokenizer.convert_tokens_to_ids(mark)
        setattr(bare, f"{name}_token", mark)
        setattr(bare, f"{name}_token_id", number)
        setattr(bare, f"{name}_ids", [number])
    bare.audio_ids = []
    return bare


def same(found, expected):
    """Ids, mask, pixels and grids; what the official class adds besides is for models that read it."""
    assert found.keys() <= expected.keys()
    assert {"input_ids", "attention_mask"} <= found.keys()
    return all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pictures_of_different_sizes_in_one_text(ours, official, count):
    text = ["".join(f"Picture {i + 1}: {HOLE}" for i in range(count)) + "make the circle red"]
    images = [picture(*size) for size in SIZES[:count]]
    found = ours(text=text, images=images, padding=True, return_tensors="pt")
    expected = official(text=text, images=images, padding=True, return_tensors="pt")
    assert same(found, expected)
    assert found.keys() >= {"pixel_values", "image_grid_thw"}
    assert len(set(map(tuple, found["image_grid_thw"].tolist()))) == count
    tokens = (found["input_ids"] == ours.tokenizer.convert_tokens_to_ids(MARK)).sum()
    assert tokens == found["image_grid_thw"].prod(-1).sum() // 4


def test_a_batch_of_texts_of_different_length_is_padded(ours, official):
    text = [f"{HOLE} a", f"{HOLE} the circle {HOLE} is red and large", f"to {HOLE}"]
    images = [picture(*size) for size in SIZES]
    found = ours(text=text, images=images, padding=True, return_tensors="pt")
    assert same(found, official(text=text, images=images, padding=True, return_tensors="pt"))
    assert (found["attention_mask"] == 0).any()


def test_text_alone_and_a_lone_picture(ours, official):
    text = ["make the circle red", "no"]
    found = ours(text=text, padding=True, return_tensors="pt")
    assert same(found, official(text=text, padding=True, return_tensors="pt"))
    assert found.keys() == {"input_ids", "attention_mask"}
    text, image = [f"{HOLE}make it blue"], picture(64, 96)
    found = ours(text=text, images=image, padding=True, return_tensors="pt")
    assert same(found, official(text=text, images=image, padding=True, return_tensors="pt"))


def test_other_pixels_or_another_order_show(ours):
    text = [f"{HOLE}{HOLE}"]
    images = [picture(112, 112), picture(64, 96)]
    first, second = (ours(text=text, images=order, return_tensors="pt") for order in (images, images[::-1]))
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["image_grid_thw"], second["image_grid_thw"])


@pytest.mark.parametrize("holes", [0, 1, 3])
def test_a_picture_without_a_place_is_refused(ours, holes):
    images = [picture(64, 64), picture(64, 96)]
    with pytest.raises(ValueError, match=f"hold {holes} image tokens for 2 pictures"):
        ours(text=[HOLE * holes + "x"], images=images, return_tensors="pt")


@pytest.fixture
def chat_processor(monkeypatch):
    """The official processor around a tokenizer, bare; its image module is the one that needs no torchvision."""
    package = "transformers.models.pixtral"
    if importlib.util.find_spec("torchvision") is None:
        stand_in = importlib.import_module(f"{package}.image_processing_pil_pixtral")
        monkeypatch.setitem(sys.modules, f"{package}.image_processing_pixtral", stand_in)
        monkeypatch.delitem(sys.modules, f"{package}.processing_pixtral", raising=False)
    kind = importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    monkeypatch.delitem(sys.modules, f"{package}.processing_pixtral")
    bare = kind.__new__(kind)
    bare.tokenizer = mistral_tokenizer()
    bare.image_processor, bare.chat_template = None, bare.tokenizer.chat_template
    return bare


@pytest.mark.parametrize("length", [64, 34], ids=["padded", "cut"])
@pytest.mark.parametrize("prompts", [["make the circle red"], ["", "make the circle red and keep [IMG] as it is"]])
def test_a_tokenizer_alone_makes_the_chat_processors_ids(chat_processor, prompts, length):
    """Asked as the pipeline asks: text-only messages with a system message; padding goes to the left."""
    from diffusers import Flux2Pipeline

    seen = []

    class Encoder:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, input_ids, attention_mask, **options):
            seen.append((input_ids, attention_mask))
            layers = torch.zeros(31, *input_ids.shape, 2)
            return type("Output", (), {"hidden_states": layers})

    for tokenizer in (chat_processor.tokenizer, chat_processor):
        Flux2Pipeline._get_mistral_3_small_prompt_embeds(Encoder(), tokenizer, prompts, max_sequence_length=length)
    (found, mask), (expected, expected_mask) = seen
    assert torch.equal(found, expected)
    assert torch.equal(mask, expected_mask)
    assert found.shape == (len(prompts), length)
    if length == 64:
        assert mask[:, 0].max() == 0
        assert mask[:, -1].min() == 1
