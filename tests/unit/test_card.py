"""The model card: what huggingface_hub reads back from it, and what it tells people."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from qflux.config import Config, ModelConfig, load_config
from qflux.tools import card_usage
from qflux.tools.card import write_card
from qflux.tools.card_call import example_call
from qflux.tools.card_facts import UNKNOWN_LICENCE, Base, Call, CardFacts, Licence, find_base, read_licence
from qflux.types import Family

BASE = Base("acme/painter", "acme/painter", "main")
APACHE = Licence("apache-2.0", known=True)
EDITS = Family(name="painter", pipeline_class="PainterEditPipeline", stages=(), controls=(0, 2))
DRAWS = Family(name="painter", pipeline_class="PainterPipeline", stages=())
CALL = Call(
    "paint it red", 1, {"height": 48, "width": 64, "max_area": 3072, "_keep": True}, "image", False, ((48, 64),)
)
FACTS = CardFacts(
    repo="me/red-paint",
    base=BASE,
    licence=APACHE,
    weights="pytorch_lora_weights.safetensors",
    step=120,
    samples=480,
    batch=4,
    pictures=[("samples/sample-0.png", 'say "no": a|b'), ("samples/sample-1.png", "paint it red")],
    sheet="samples/sheet.png",
    drawn_at=120,
    call=CALL,
    held_out=(100, 0.123456),
    digest="d1ge57",
    version="1.2.3",
)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Makes a config of two edits; ``changes`` by dotted key."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")

    def make(**changes: Any) -> Config:
        tree: dict[str, Any] = {
            "model": {"pretrained_model_name_or_path": "acme/painter", "lora": {"r": 8, "lora_alpha": 16}},
            "data": {"dataset_path": [{"repo_id": "acme/pairs"}], "target_size": [48, 64]},
            "train": {"trainer": "Painter", "optimizer": {"lr": 2e-4}, "seed": 5},
            "logging": {
                "validation": {
                    "samples": [
                        {"prompt": "no control"},
                        {"prompt": "paint it [trigger]", "controls": [str(tmp_path / "a.png")]},
                    ]
                }
            },
        }
        for name, value in changes.items():
            *sections, last = name.split("__")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        return load_config(file)

    return make


def code_of(text: str) -> str:
    """The card's Python code; it parses."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    ast.parse(found[1])
    return found[1]


def section(text: str, title: str) -> str:
    """A section of the card, empty where there is none."""
    found = re.search(rf"^## {title}.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found[0] if found else ""


def test_the_hub_reads_every_field_back(config: Any) -> None:
    text = write_card(FACTS, config(data__trigger_word="xyzzy"), EDITS)
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "base_model": "acme/painter",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "pipeline_tag": "image-to-image",
        "tags": ["image-to-image", "diffusers", "diffusers-training", "template:sd-lora", "lora", "qflux"],
        "instance_prompt": "xyzzy",
        "datasets": ["acme/pairs"],
        "widget": [
            {"text": 'say "no": a|b', "output": {"url": "samples/sample-0.png"}},
            {"text": "paint it red", "output": {"url": "samples/sample-1.png"}},
        ],
    }
    assert str(card) == text
    assert "`xyzzy`" in card.text


def test_the_training_table_tells_the_run(config: Any) -> None:
    changes = {"train__loss": {"mask_loss": True, "normalize": True}, "train__ema": {"decay": 0.99}}
    sigma = {"sampling": "logit_normal", "logit_mean": 0.5, "shift": "auto"}
    text = write_card(replace(FACTS, averaged=True), config(train__sigma=sigma, **changes), EDITS)
    table = dict(re.findall(r"^\| (.+?) \| (.+) \|$", section(text, "Training"), re.MULTILINE))
    assert table["base model"] == "[acme/painter](https://huggingface.co/acme/painter), revision `main`"
    assert (table["optimizer steps"], table["samples per step"], table["samples seen"]) == ("120", "4", "480")
    assert (table["rank, alpha"], table["targets"]) == ("8, 16", "`attention`")
    assert table["optimizer"].startswith("adamw, learning rate 0.0002")
    assert table["size of targets (height × width)"] == "48 × 64"
    assert table["noise levels (sigma)"] == "logit_normal (mean 0.5, deviation 1), shift auto, weighting none"
    assert table["loss"] == "mse, weight 2 inside the masks, 1 outside, normalised"
    assert table["precision"] == "base bfloat16, adapter float32"
    assert table["held-out loss at step 100"] == "0.1235"
    assert (table["seed"], table["digest of the data"], table["qflux"]) == ("5", "`d1ge57`", "1.2.3")
    assert table["averaged weights (EMA)"] == "decay 0.99"
    assert "moving average" in section(text, "Limits")


def test_the_code_calls_the_pipeline_as_the_samples_were_drawn(config: Any) -> None:
    text = write_card(FACTS, config(logging__validation__guidance_scale=2.5), EDITS)
    call = next(node for node in ast.walk(ast.parse(code_of(text))) if getattr(node, "attr", "") == "images").value
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    assert given == {
        "image": "control",
        "prompt": "'paint it red'",
        "height": "48",
        "width": "64",
        "max_area": "3072",
        "_keep": "True",
        "guidance_scale": "2.5",
        "num_inference_steps": "28",
        "generator": "torch.Generator('cpu').manual_seed(43)",
    }
    code = code_of(text)
    assert 'PainterEditPipeline.from_pretrained("acme/painter", revision="main", dtype=torch.bfloat16)' in code
    assert 'pipe.load_lora_weights("me/red-paint", weight_name="pytorch_lora_weights.safetensors")' in code


def test_several_controls_are_a_list_and_a_prompt_is_quoted(config: Any) -> None:
    call = replace(CALL, prompt='a "red" \\ ü', listed=True, controls=((48, 64), (16, 32)))
    code = code_of(write_card(replace(FACTS, call=call), config(), EDITS))
    assert "image=[control_1, control_2]," in code
    assert 'control_2 = ImageOps.fit(load_image("control_2.png"), (32, 16), ' in code
    quoted = re.search(r"prompt=(.*),$", code, re.MULTILINE)
    assert quoted is not None
    assert ast.literal_eval(quoted[1]) == 'a "red" \\ ü'


def test_text_to_image_needs_no_picture(config: Any) -> None:
    drawn = replace(FACTS, call=Call(arguments={"height": 48}))
    for family, samples in ((DRAWS, []), (EDITS, [{"prompt": "p"}])):
        text = write_card(drawn, config(logging__validation__samples=samples), family)
        card = ModelCard(text)
        assert card.data.pipeline_tag == "text-to-image"
        assert "text-to-image" in card.data.tags
        assert "image-to-image" not in text
        assert not section(text, "Sizes of control pictures")
        assert "load_image" not in code_of(text)
        assert "size of controls" not in text


def test_a_whole_network_is_a_finetune(config: Any) -> None:
    facts = replace(FACTS, weights="transformer", network="PainterTransformer", base=replace(BASE, revision=None))
    text = write_card(facts, config(model__lora=None), EDITS)
    card = ModelCard(text)
    assert card.data["base_model_relation"] == "finetune"
    assert not {"lora", "template:sd-lora"} & set(card.data.tags)
    code = code_of(text)
    assert "load_lora_weights" not in code
    loaded = 'PainterTransformer.from_pretrained("me/red-paint", subfolder="transformer", dtype=torch.float32)'
    assert f"transformer = {loaded}" in code
    assert 'from_pretrained("acme/painter", dtype=torch.float32, transformer=transformer)' in code
    assert not section(text, "Use in ComfyUI")
    assert "| trained | the whole network |" in text


@pytest.mark.parametrize(
    ("rule", "patch", "extended", "said"),
    [
        (None, "", (), "takes pictures of this size as they are"),
        (lambda size: (96, 96), "", (), "The arguments of the call keep"),
        (lambda size: (96, 96), "", ("sizes",), "alone would resize them once more"),
        (lambda size: (96, 96), "pipe.rule = ($width, $height), $in_order", ("sizes",), "keep it from that"),
        (lambda size: size, "pipe.rule = 1", (), "takes pictures of this size as they are"),
    ],
)
def test_sizes_of_controls_are_told_where_the_config_made_them(
    config: Any, rule: Any, patch: str, extended: tuple[str, ...], said: str
) -> None:
    family = SimpleNamespace(**{**vars(EDITS), "control_size": rule, "size_multiple": 16, "control_patch": patch})
    facts = replace(FACTS, call=replace(CALL, extended=extended))
    text = write_card(facts, config(), family)  # type: ignore[arg-type]
    told = section(text, "Sizes of control pictures")
    assert said in told
    assert "48 × 64 (height × width, pixels)" in told
    assert 'ImageOps.fit(load_image("control.png"), (64, 48), Image.Resampling.LANCZOS)' in code_of(text)
    wanted = "pipe.rule = (64, 48), [(64, 48), (64, 48)]"
    assert (wanted in code_of(text)) is ("$width" in patch)
    assert ("pipe.rule" in text) is ("# the controls keep their sizes" in code_of(text)) is ("$width" in patch)


def test_the_pipelines_own_rule_needs_no_section(config: Any) -> None:
    text = write_card(FACTS, config(data__control_plan="pipeline"), EDITS)
    assert "control_plan" not in text
    assert 'control = load_image("control.png")\n' in code_of(text)
    assert "ImageOps" not in text
    assert "| size of controls | by the rule of the pipeline |" in text


def test_sizes_of_each_control_and_of_many_targets(config: Any) -> None:
    sizes = {"data__controls_size": [[32, 32], [64, 48]], "data__target_size": None}
    text = write_card(FACTS, config(data__multi_resolutions=[512, "64*48", [32, 16]], **sizes), EDITS)
    assert "- control 1: 32 × 32; control 2: 64 × 48\n" in section(text, "Sizes")
    assert "| size of targets (height × width) | nearest of 512, 64*48, 32 × 16 |" in text


def test_what_qflux_adds_to_a_pipeline_is_told(config: Any) -> None:
    text = write_card(replace(FACTS, call=replace(CALL, extended=("more_controls",))), config(), EDITS)
    assert "extended `PainterEditPipeline` (`more_controls`)" in section(text, "Use in diffusers")


def test_the_comfyui_file_and_its_place(config: Any) -> None:
    facts = replace(FACTS, comfyui="x_comfyui.safetensors")
    told = section(write_card(facts, config(), EDITS), "Use in ComfyUI")
    assert "[x_comfyui.safetensors](x_comfyui.safetensors) into `ComfyUI/models/loras/`" in told
    assert "--export comfyui" in section(write_card(FACTS, config(), EDITS), "Use in ComfyUI")


def test_a_run_without_pictures_says_so(config: Any) -> None:
    text = write_card(replace(FACTS, pictures=(), sheet=None, held_out=None), config(), EDITS)
    assert not section(text, "Samples")
    assert "It was not evaluated" in section(text, "Limits")
    assert ModelCard(text).data.get("widget") is None
    earlier = write_card(replace(FACTS, drawn_at=60, sheet=None), config(), EDITS)
    assert "Drawn at step 60; these weights are those of step 120" in earlier
    assert "![sample](samples/sample-1.png)" in earlier


def test_the_empty_prompt_is_given_where_the_pipeline_takes_one(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guided = replace(EDITS, classifier_free=True, guidance="true_scale", empty_prompt=" ")
    settings = config(logging__validation__guidance_scale=3.0)
    asked = []
    monkeypatch.setattr(card_usage, "_takes", lambda *words: asked.append(words) or True)
    code = code_of(write_card(FACTS, settings, guided))
    assert 'negative_prompt=" "' in code
    assert "true_scale=3.0" in code
    assert asked == [("PainterEditPipeline", "negative_prompt")]
    assert "negative_prompt" not in code_of(write_card(FACTS, config(), guided))  # guidance 1 needs none
    assert "negative_prompt" not in code_of(write_card(FACTS, settings, EDITS))


def test_whether_a_pipeline_takes_an_argument_is_read_from_diffusers() -> None:
    assert card_usage._takes("QwenImagePipeline", "negative_prompt")
    assert not card_usage._takes("Flux2KleinPipeline", "negative_prompt")
    assert not card_usage._takes("PainterPipeline", "negative_prompt")


def local(folder: Path, front: str) -> Base:
    """A base model in a folder with a card."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(front)
    return Base(folder.name, folder=folder)


OTHER = "---\nlicense: other\nlicense_name: painter-licence\nlicense_link: LICENSE.md\n---\n# Painter\n"


def test_the_licence_of_a_local_base_is_inherited(tmp_path: Path, config: Any) -> None:
    found = read_licence(local(tmp_path / "m", OTHER))
    assert found == Licence("other", "painter-licence", None, known=True)  # a link into that folder leads nowhere
    card = ModelCard(write_card(replace(FACTS, licence=found), config(), EDITS))
    assert (card.data.license, card.data.license_name) == ("other", "painter-licence")
    assert "`painter-licence`, inherited from [acme/painter]" in section(str(card), "Licence")


def test_a_licence_that_cannot_be_read_is_not_invented(tmp_path: Path, config: Any) -> None:
    for front in ("no front matter", "---\nlicense:\n---\n", "---\n[broken\n---\n", "---\n- a list\n---\n"):
        assert read_licence(local(tmp_path / "m", front)) == Licence(name=UNKNOWN_LICENCE)
    found = read_licence(BASE)  # on the hub, which is out of reach
    assert found == Licence("other", UNKNOWN_LICENCE, "https://huggingface.co/acme/painter", known=False)
    card = ModelCard(write_card(replace(FACTS, licence=found), config(), EDITS))
    assert (card.data.license, card.data.license_name) == ("other", "same-as-base")
    assert "could not be read" in section(str(card), "Licence")


def test_the_licence_of_a_hub_model_comes_from_its_cached_card(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "README.md").write_text(OTHER.replace("LICENSE.md", "./LICENSE.md"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(tmp_path / "README.md"))
    link = "https://huggingface.co/acme/painter/blob/main/LICENSE.md"
    assert read_licence(BASE) == Licence("other", "painter-licence", link, known=True)


def test_the_licence_of_a_hub_model_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ModelCardData(license=["mit", "apache-2.0"], license_link="https://example.com/l")  # type: ignore[arg-type]
    answers: list[Any] = [SimpleNamespace(card_data=data), SimpleNamespace(card_data=None), OfflineModeIsEnabled("no")]

    class Api:
        def model_info(self, repo: str, **options: Any) -> Any:
            assert (repo, options["revision"]) == ("acme/painter", "main")
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert read_licence(BASE) == Licence("mit", None, "https://example.com/l", known=True)
    assert not read_licence(BASE).known
    assert not read_licence(BASE).known
    assert not answers


def test_the_base_is_a_hub_id_or_the_last_name_of_a_folder(tmp_path: Path, config: Any) -> None:
    def base(name: str, revision: str | None = None) -> Base:
        return find_base(ModelConfig(pretrained_model_name_or_path=name, revision=revision))

    assert base("acme/painter", "v2") == Base("acme/painter", "acme/painter", "v2")
    folder = tmp_path / "models" / "painter"
    assert base(str(folder)) == Base("painter", folder=folder)
    commit = "0123456789" * 4
    cached = tmp_path / "models--acme--painter" / "snapshots" / commit
    assert base(str(cached)) == Base("painter", "acme/painter", commit, cached)
    text = write_card(replace(FACTS, base=base(str(folder))), config(), EDITS)
    assert ModelCard(text).data.base_model is None
    assert 'from_pretrained("path/to/painter", dtype' in code_of(text)
    assert str(tmp_path) not in text


class Painter:
    """A trainer as far as a call needs one."""

    family = EDITS

    def __init__(self, config: Config, folder: Path, *, dtype: Any, device: Any) -> None:
        self.config = config

    def call_kwargs(self, sample: Any) -> dict[str, Any]:
        """Pictures, plain values, and what no stranger can be given."""
        height, width = sample.sizes.target.size
        return {
            "image": sample.controls or None,
            "size": (height, width),
            "none": None,
            "tensor": object(),
            "pipeline.more": sample.controls,
            "pipeline.less": [],
        }


def test_the_example_call_is_the_trainers_own(config: Any, tmp_path: Path) -> None:
    settings = config(data__trigger_word="red")
    wanted = Call("paint it red", 1, {"size": [48, 64]}, "image", True, ((48, 64),), ("more",))
    assert example_call(Painter, settings) == wanted
    (tmp_path / "a.png").unlink()  # a card can be written where the pictures have gone
    Image.new("RGB", (32, 16)).save(tmp_path / "drawn.png")
    gone = example_call(Painter, settings, [tmp_path / "drawn.png"])
    assert gone == replace(wanted, arguments={"size": [16, 32]}, controls=((16, 32),))


def test_the_example_call_without_samples(config: Any) -> None:
    plain = example_call(Painter, config(logging__validation__samples=[], data__controls_size=[32, 16]))
    assert plain == Call("", 0, {"size": [48, 64]}, "image", True, ((32, 16),), ("more",))

    class Reader(Painter):
        family = replace(DRAWS, control_size=lambda size: size)

        def call_kwargs(self, sample: Any) -> dict[str, Any]:
            raise FileNotFoundError("model_index.json")

    assert example_call(Reader, config(logging__validation__samples=[])) == Call()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"model__quantize": "bnb-nf4"}, "base bfloat16, its blocks bnb-nf4, adapter float32"),
        ({"model__lora": None}, "weights in float32, computed in bfloat16"),
    ],
)
def test_the_precision_tells_the_bases_format(config: Any, model: dict[str, Any], expected: str) -> None:
    text = write_card(FACTS, config(**model), EDITS)
    assert f"| precision | {expected} |" in text
