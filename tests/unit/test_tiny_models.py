import hashlib
import json

import pytest
import torch
from PIL import Image

from qflux.demo import tiny_models
from qflux.demo.shapes import pairs
from qflux.demo.tokenizers import WORDS, clip_tokenizer, t5_tokenizer

CALL = {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False, "max_sequence_length": 64}


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(folder):
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return tiny_models.build_flux_kontext_random(tmp_path_factory.mktemp("random"), seed=1)


@pytest.fixture(scope="module")
def pipeline(random_folder):
    return load(random_folder)


def test_same_seed_same_bytes(random_folder, tmp_path):
    again = digest(tiny_models.build_flux_kontext_random(tmp_path / "again", seed=1))
    other = digest(tiny_models.build_flux_kontext_random(tmp_path / "other", seed=2))
    assert digest(random_folder) == again
    assert (
        other["transformer/diffusion_pytorch_model.safetensors"]
        != again["transformer/diffusion_pytorch_model.safetensors"]
    )


def test_building_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tiny_models.build_flux_kontext_random(tmp_path, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_random_folder_is_small_and_says_nothing_of_this_machine(random_folder):
    files = [path for path in random_folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            assert str(random_folder) not in path.read_text()


def test_random_pipeline_draws_and_listens(pipeline):
    def draw(prompt, colour):
        image = Image.new("RGB", (64, 64), colour)
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipeline(image, prompt, num_inference_steps=2, generator=generator, output_type="np", **CALL)[0]
        )

    base = draw(prompt="make the circle red", colour="blue")
    assert base.shape == (1, 64, 64, 3)
    assert not torch.allclose(base, draw("make the square red", "blue"), atol=1e-3)
    assert not torch.allclose(base, draw("make the circle red", "green"), atol=1e-3)


def test_scheduler_has_the_full_models_constants(pipeline):
    config = pipeline.scheduler.config
    found = {key: config[key] for key in ("use_dynamic_shifting", "base_shift", "max_shift", "shift")}
    assert found == {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    assert (config.base_image_seq_len, config.max_image_seq_len) == (256, 4096)


def test_words_are_single_tokens():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in WORDS:
        assert len(clip(word).input_ids) == 3, word
        assert len(t5(word).input_ids) == 2, word
    assert "unk" not in t5.decode(t5("Zebra-42!").input_ids)
    assert clip.decode(clip("zebra").input_ids, skip_special_tokens=True).strip() == "zebra"


def test_pretraining_prompts_need_no_spelling():
    known = set(WORDS)
    stream = pairs("pretrain", 0)
    assert {word for _ in range(500) for word in next(stream).prompt.split()} <= known
    assert {"segment", "white", "black"} <= known


def test_tokenizers_survive_the_folder(pipeline):
    text = "make the circle red and unseen Wörter"
    assert pipeline.tokenizer(text).input_ids == clip_tokenizer()(text).input_ids
    assert pipeline.tokenizer_2(text).input_ids == t5_tokenizer()(text).input_ids
    assert type(pipeline.tokenizer).__name__ == "CLIPTokenizer"
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id


def test_a_word_carries_its_neighbours(pipeline):
    def embed(prompt):
        return pipeline.encode_prompt(prompt, prompt, max_sequence_length=64)

    one = embed("make the circle red and the background blue")
    two = embed("make the circle blue and the background red")
    red_of_circle, red_of_background = one[0][0, 3], two[0][0, 7]
    assert torch.cosine_similarity(red_of_circle, red_of_background, dim=0) < 0.9
    other = embed("make the circle green and the background blue")
    assert (one[1] - other[1]).norm() > 0.1 * one[1].norm()


@pytest.mark.skipif(not (tiny_models.PRETRAINED / "model_index.json").exists(), reason="not published yet")
def test_base_folder_is_the_pretrained_one_with_another_transformer(tmp_path):
    base = digest(tiny_models.build_flux_kontext_base(tmp_path / "base", seed=0))
    shipped = digest(tiny_models.PRETRAINED)
    assert set(base) == set(shipped)
    differing = {name for name in base if base[name] != shipped[name]}
    assert "transformer/diffusion_pytorch_model.safetensors" in differing
    assert all(name.startswith("transformer/") for name in differing)


def test_pretrained_folder_fits_its_budget():
    files = [path for path in tiny_models.PRETRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    for path in files:
        assert path.suffix in (".json", ".safetensors", ".md")
        if path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text())
