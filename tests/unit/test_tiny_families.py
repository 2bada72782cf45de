"""The tiny random folders of the families but Kontext: real layout, official pipelines draw, conditions matter."""

import functools
import hashlib
import itertools
import json
from functools import partial

import pytest
import torch
from PIL import Image, ImageDraw

from qflux.demo import tiny_flux2, tiny_models, tiny_qwen
from qflux.demo.tokenizers import TEMPLATE_WORDS, WORDS, mistral_tokenizer, qwen_tokenizer

BUILDERS = {
    "flux_dev": tiny_models.build_flux_random,
    "flux_schnell": partial(tiny_models.build_flux_random, guidance=False),
    "qwen": tiny_qwen.build_qwen_image_random,
    "qwen_edit": tiny_qwen.build_qwen_image_edit_random,
    "qwen_plus": tiny_qwen.build_qwen_image_edit_plus_random,
    "qwen_plus_2511": partial(tiny_qwen.build_qwen_image_edit_plus_random, zero_cond_t=True),
    "flux2": tiny_flux2.build_flux2_random,
    "klein": tiny_flux2.build_flux2_klein_random,
    "klein_distilled": partial(tiny_flux2.build_flux2_klein_random, distilled=True),
}
EDITS = [name for name in BUILDERS if name.startswith(("qwen_", "flux2", "klein"))]
PROMPT, OTHER_PROMPT = "make the circle red", "make the circle blue"
MUCH = 5e-3  # relative change of the latents; rounding is below 1e-6


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def picture(shape, background):
    image = Image.new("RGB", (64, 64), background)
    ImageDraw.Draw(image).ellipse((16, 16, 32, 32), fill=shape)
    return image


RED, GREEN = picture("red", "blue"), picture("green", "yellow")


def processor(folder):
    """The official processor without the torchvision it asks for: made bare, its own ``__call__`` runs."""
    import transformers

    bare = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    bare.tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder, subfolder="processor")
    bare.image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder, subfolder="processor")
    bare.video_processor = bare.chat_template = None
    bare.image_token, bare.video_token = "<|image_pad|>", "<|video_pad|>"
    bare.image_token_id = bare.tokenizer.convert_tokens_to_ids(bare.image_token)
    bare.video_token_id = bare.tokenizer.convert_tokens_to_ids(bare.video_token)
    bare.image_ids, bare.video_ids, bare.audio_ids = [bare.image_token_id], [bare.video_token_id], []
    return bare


def official(folder):
    """The pipeline that the index names, built from components loaded one by one with the classes it names."""
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    for name, (library, class_name) in [item for item in parts.items() if isinstance(item[1], list)]:
        if class_name == "Qwen2VLProcessor":
            parts[name] = processor(folder)
        elif class_name == "PixtralProcessor":
            parts[name] = transformers.AutoTokenizer.from_pretrained(folder, subfolder=name)
        elif class_name is not None:
            cls = getattr(diffusers if library == "diffusers" else transformers, class_name)
            parts[name] = cls.from_pretrained(folder, subfolder=name)
            assert type(parts[name]).__name__ == class_name or class_name.endswith("Fast")
    pipeline = getattr(diffusers, index["_class_name"])(**{k: v for k, v in parts.items() if v != [None, None]})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Folders:
    """Each folder is built, and its pipeline loaded, at first use."""

    def __init__(self, root):
        self.root = root
        self._build = functools.cache(lambda name: BUILDERS[name](root / name, seed=1))
        self.pipeline = functools.cache(lambda name: official(self[name]))

    def __getitem__(self, name):
        return self._build(name)

    def config(self, name, part):
        return json.loads((self[name] / part / "config.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("families"))


@pytest.fixture
def small_controls(monkeypatch):
    """The official pipelines of Qwen scale each control to fixed areas; here to 64x64."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (64, 64))


def draw(folders, name, prompt=PROMPT, image=None, output_type="latent", **options):
    """Two steps at 64x64, from fixed noise; the edit models of Qwen need an image."""
    pipeline = folders.pipeline(name)
    if not name.startswith("qwen"):
        options = {"max_sequence_length": 64, **options}
    if image is not None:
        options["image"] = image
    elif name.startswith("qwen_"):
        options["image"] = RED if name == "qwen_edit" else [RED]
    options |= {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": output_type}
    return torch.as_tensor(pipeline(prompt=prompt, generator=torch.Generator().manual_seed(0), **options)[0])


def change(one, other):
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_same_bytes_and_no_trace_in_the_global_generator(folders, tmp_path, name):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    again = digest(BUILDERS[name](tmp_path / "again", seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert again == digest(folders[name])
    other = digest(BUILDERS[name](tmp_path / "other", seed=2))
    assert set(other) == set(again)
    differing = {path for path in other if other[path] != again[path]}
    assert differing == {path for path in other if path.endswith(".safetensors")}


@pytest.mark.parametrize("name", BUILDERS)
def test_folder_is_small_and_says_nothing_of_this_machine(folders, name):
    files = [path for path in folders[name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
    texts = [path.read_text() for path in files if path.suffix == ".json"]
    assert not any(word in text for word in (str(folders.root), "name_or_path") for text in texts)


def test_building_says_nothing(tmp_path, capfd):
    for name, build in BUILDERS.items():
        build(tmp_path / name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell", "qwen", "klein"])
def test_folders_without_a_processor_open_as_a_whole(folders, name):
    parts = folders.pipeline(name).components
    whole = type(folders.pipeline(name)).from_pretrained(folders[name]).components
    assert {key: type(part) for key, part in whole.items()} == {key: type(part) for key, part in parts.items()}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.usefixtures("small_controls")
def test_official_pipeline_draws(folders, name):
    pixels = draw(folders, name, output_type="np")
    assert pixels.shape == (1, 64, 64, 3)
    assert pixels.isfinite().all()
    assert pixels.std() > 0.05


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.usefixtures("small_controls")
def test_the_prompt_matters(folders, name):
    assert change(draw(folders, name), draw(folders, name, OTHER_PROMPT)) > MUCH
    pixels = [draw(folders, name, prompt, output_type="np") for prompt in (PROMPT, OTHER_PROMPT)]
    assert (pixels[0] - pixels[1]).abs().max() > 4 / 255


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.usefixtures("small_controls")
def test_the_control_matters(folders, name):
    wrap = (lambda image: image) if name == "qwen_edit" else (lambda image: [image])
    red = draw(folders, name, image=wrap(RED))
    assert change(red, draw(folders, name, image=wrap(GREEN))) > MUCH
    if name != "qwen_edit":
        two = draw(folders, name, image=[RED, GREEN])
        assert change(red, two) > MUCH
        assert change(two, draw(folders, name, image=[GREEN, RED])) > MUCH
    if not name.startswith("qwen"):
        assert change(red, draw(folders, name)) > MUCH


def test_guidance_matters_where_it_is_embedded(folders):
    embedded = {name: folders.config(name, "transformer")["guidance_embeds"] for name in BUILDERS}
    assert {name for name, is_so in embedded.items() if is_so} == {"flux_dev", "flux2"}
    for name in ("flux_dev", "flux2"):
        one, four = (draw(folders, name, guidance_scale=scale) for scale in (1.0, 4.0))
        assert change(one, four) > MUCH
    one, four = (draw(folders, "flux_schnell", guidance_scale=scale) for scale in (1.0, 4.0))
    assert torch.equal(one, four)


def test_only_the_undistilled_klein_is_guided(folders):
    for name, distilled in (("klein", False), ("klein_distilled", True)):
        assert folders.pipeline(name).config.is_distilled is distilled
        one, four = (draw(folders, name, guidance_scale=scale) for scale in (1.0, 4.0))
        assert (change(one, four) > MUCH) is not distilled


@pytest.mark.usefixtures("small_controls")
def test_qwen_is_guided_by_a_negative_prompt(folders):
    for name in ("qwen", "qwen_edit", "qwen_plus"):
        guided = draw(folders, name, negative_prompt=" ", true_cfg_scale=4.0)
        assert change(draw(folders, name), guided) > MUCH


@pytest.mark.usefixtures("small_controls")
def test_2511_sees_its_controls_at_time_zero(folders):
    flags = {name: folders.config(name, "transformer").get("zero_cond_t") for name in BUILDERS if "qwen" in name}
    assert {name for name, flag in flags.items() if flag} == {"qwen_plus_2511"}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert digest(folders["qwen_plus"])[weights] == digest(folders["qwen_plus_2511"])[weights]
    assert change(draw(folders, "qwen_plus"), draw(folders, "qwen_plus_2511")) > MUCH


def test_the_index_is_the_full_models(folders):
    def index(name):
        content = json.loads((folders[name] / "model_index.json").read_text())
        return {key: value[1] if isinstance(value, list) else value for key, value in content.items()}

    shared = {"scheduler": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": index("qwen")["_diffusers_version"]}
    qwen = {
        **shared,
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }
    flux2 = {**shared, "transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"}
    mistral = {"text_encoder": "Mistral3ForConditionalGeneration", "tokenizer": "PixtralProcessor"}
    qwen3 = {"text_encoder": "Qwen3ForCausalLM", "tokenizer": "Qwen2TokenizerFast"}
    edit = qwen | {"processor": "Qwen2VLProcessor"}
    assert index("qwen") == qwen | {"_class_name": "QwenImagePipeline"}
    assert index("qwen_edit") == edit | {"_class_name": "QwenImageEditPipeline"}
    assert index("qwen_plus") == edit | {"_class_name": "QwenImageEditPlusPipeline"}
    assert index("flux2") == flux2 | mistral | {"_class_name": "Flux2Pipeline"}
    klein = flux2 | qwen3 | {"_class_name": "Flux2KleinPipeline"}
    assert index("klein") == klein | {"is_distilled": False}
    assert index("klein_distilled") == klein | {"is_distilled": True}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("flux_dev", "flux2", "klein"), (3.0, True, 0.5, 1.15, 256, 4096, None)),
        (("flux_schnell",), (1.0, False, 0.5, 1.15, 256, 4096, None)),
        (("qwen", "qwen_edit", "qwen_plus"), (1.0, True, 0.5, 0.9, 256, 8192, 0.02)),
    ],
)
def test_schedulers_have_the_full_models_constants(folders, names, expected):
    keys = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    for name in names:
        config = folders.pipeline(name).scheduler.config
        assert tuple(config[key] for key in (*keys, "shift_terminal")) == expected
        assert config.time_shift_type == "exponential"


@torch.no_grad()
def test_normalisation_of_latents_cannot_be_forgotten(folders):
    """Latents of pictures move by much when the VAE's statistics are left out, in every channel."""
    pixels = torch.stack([folders.pipeline("klein").image_processor.preprocess(image)[0] for image in (RED, GREEN)])
    flux = folders.pipeline("flux_dev").vae
    assert (flux.config.shift_factor, flux.config.scaling_factor) == (0.1159, 0.3611)
    vae = folders.pipeline("qwen").vae
    latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    assert latents.shape == (2, 4, 1, 8, 8)
    for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        values = latents[:, channel]
        assert change(values, (values - mean) / std) > 0.2
    for name in ("flux2", "klein"):
        pipeline = folders.pipeline(name)
        patches = pipeline._patchify_latents(pipeline.vae.encode(pixels).latent_dist.mode())
        assert patches.shape == (2, 16, 4, 4)
        statistics = pipeline.vae.bn
        for channel, (mean, variance) in enumerate(zip(statistics.running_mean, statistics.running_var, strict=True)):
            values = patches[:, channel]
            assert change(values, (values - mean) / variance.sqrt()) > 0.2
        assert change(patches[:1], patches[1:]) > 0.2


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen", "flux2", "klein"])
def test_the_vae_is_8x(folders, name):
    pipeline = folders.pipeline(name)
    assert pipeline.vae_scale_factor == 8
    pixels = torch.zeros(1, 3, 1, 64, 96) if name == "qwen" else torch.zeros(1, 3, 64, 96)
    assert pipeline.vae.encode(pixels).latent_dist.mode().shape[-2:] == (8, 12)


def test_words_and_templates_are_single_tokens():
    qwen, mistral = qwen_tokenizer(), mistral_tokenizer()
    for word in (*WORDS, *TEMPLATE_WORDS):
        for text in (word, f" {word}"):
            assert len(qwen(text).input_ids) == 1, text
            assert len(mistral(text, add_special_tokens=False).input_ids) == 1, text
    for tokenizer in (qwen, mistral):
        text = "Wörter, unseen: Zebra-42!\n\t"
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("name", ["qwen", "qwen_edit", "qwen_plus"])
def test_dropping_the_template_leaves_the_users_words(folders, name):
    """The official drop point is exactly where the user's part starts, as with the full-size tokenizer."""
    pipeline = folders.pipeline(name)
    drop = pipeline.prompt_template_encode_start_idx
    text = pipeline.prompt_template_encode.format(PROMPT)
    tokens = pipeline.tokenizer.tokenize(text)
    assert tokens[drop - 3 : drop] == ["<|im_start|>", "user", "Ċ"]
    words = ["make", "Ġthe", "Ġcircle", "Ġred"]
    image = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"] if name == "qwen_edit" else []
    assert tokens[drop:] == [*image, *words, "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen_edit", "qwen_plus"])
def test_the_picture_stays_after_the_drop_point(folders, name):
    pipeline = folders.pipeline(name)
    control = RED if name == "qwen_edit" else [RED]
    text = pipeline.prompt_template_encode.format("<|vision_start|><|image_pad|><|vision_end|>" * (name == "qwen_plus"))
    inputs = pipeline.processor(text=[text], images=control, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert inputs["pixel_values"].shape == (16, 3 * 2 * 14 * 14)
    at = (inputs["input_ids"][0] == pipeline.text_encoder.config.image_token_id).nonzero().flatten()
    assert len(at) == 4
    assert at.min() > pipeline.prompt_template_encode_start_idx
    embeds = [pipeline.encode_prompt(PROMPT, image=[image])[0] for image in (RED, GREEN)]
    first = 1 if name == "qwen_edit" else 6  # behind "Picture 1: <|vision_start|>"
    assert change(embeds[0][:, first : first + 4], embeds[1][:, first : first + 4]) > 0.3
    assert change(embeds[0][:, first + 5 :], embeds[1][:, first + 5 :]) > 0.02  # the words saw the picture


def test_edit_processor_opens_with_its_real_names(folders):
    import transformers

    for name in ("qwen_edit", "qwen_plus"):
        files = {path.name for path in (folders[name] / "processor").iterdir()}
        assert files == {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        found = transformers.Qwen2VLImageProcessorPil.from_pretrained(folders[name], subfolder="processor")
        assert (found.patch_size, found.merge_size, found.temporal_patch_size) == (14, 2, 2)
        assert (found.size.shortest_edge, found.size.longest_edge) == (3136, 12845056)
        assert [round(value, 3) for value in found.image_mean] == [0.481, 0.458, 0.408]
        assert [round(value, 3) for value in found.image_std] == [0.269, 0.261, 0.276]


def test_qwen_template_closes_thinking_only_when_asked(folders):
    messages = [{"role": "user", "content": PROMPT}]
    for name in ("qwen", "klein"):
        tokenizer = folders.pipeline(name).tokenizer
        start = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
        write = partial(tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=True)
        assert write() == write(enable_thinking=True) == start
        assert write(enable_thinking=False) == start + "<think>\n\n</think>\n\n"
        assert tokenizer.padding_side == "right"
        pictured = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
        text = tokenizer.apply_chat_template(pictured, tokenize=False)
        assert text == f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{PROMPT}<|im_end|>\n"


def test_mistral_template_pads_left_and_keeps_the_prompt(folders):
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    tokenizer = folders.pipeline("flux2").tokenizer
    assert tokenizer.padding_side == "left"
    ids = tokenizer.apply_chat_template(
        format_input([PROMPT]), return_dict=True, padding="max_length", truncation=True, max_length=64
    )["input_ids"][0]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(tokens) == 64
    assert tokens[-6:] == ["[INST]", "make", "Ġthe", "Ġcircle", "Ġred", "[/INST]"]
    assert tokens.count("<s>") == 1
    start = tokens.index("<s>")
    assert set(tokens[:start]) == {"<pad>"}
    assert tokens[start + 1] == "[SYSTEM_PROMPT]"
    assert tokenizer("red").input_ids[0] == tokenizer.bos_token_id
    files = {path.name for path in (folders["flux2"] / "tokenizer").iterdir()}
    assert {"processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json"} <= files


@torch.no_grad()
@pytest.mark.parametrize(("name", "last"), [("flux2", 30), ("klein", 27)])
def test_text_encoders_are_deeper_than_what_is_read(folders, name, last):
    encoder = folders.pipeline(name).text_encoder
    hidden = encoder(torch.arange(5, 25).unsqueeze(0), output_hidden_states=True, use_cache=False).hidden_states
    assert len(hidden) > last + 2
    read = [hidden[last // 3 * count] for count in (1, 2, 3)]
    assert all(change(one, other) > 0.1 for one, other in itertools.pairwise(read))
    assert all(0.3 < layer.std() < 3 for layer in read)
