from __future__ import annotations

import pytest
from PIL import Image

from qflux.config import load_config
from qflux.config_errors import is_known
from qflux.config_yaml import parse
from qflux.errors import UserError
from qflux.migrate import main, migrate
from qflux.old_layout import RULES

CURRENT = """\
trainer: QwenImageEdit
model:
  pretrained_model_name_or_path: Qwen/Qwen-Image-Edit
  quantize: true
  pretrained_embeddings: null
  lora: {r: 16, lora_alpha: 32, init_lora_weights: gaussian, target_modules: [to_k, to_out.0],
         pretrained_weight: null, adapter_name: default}
data:
  class_path: qfluxutils.hugginface.load_editing_dataset
  init_args:
    dataset_path: [{repo_id: owner/faces, split: train}, owner/more, pairs]
    caption_dropout_rate: 0.05
    prompt_image_dropout_rate: 0.05
    use_edit_mask: false
    selected_control_indexes: null
    processor: {class_path: qflux.data.preprocess.ImageProcessor,
      init_args: {process_type: center_crop, resize_mode: bilinear, target_size: [832, 576],
                  controls_size: [[832, 576]]}}
  batch_size: 2
  num_workers: 2
  shuffle: true
loss: {mask_loss: true, forground_weight: 3.0, background_weight: 1.0}
optimizer: {class_path: bitsandbytes.optim.Adam8bit, init_args: {lr: 1.0e-4, betas: [0.9, 0.98], amsgrad: true}}
lr_scheduler: {scheduler_type: cosine, warmup_steps: 50, num_cycles: 0.5, power: 1.0}
train: {gradient_accumulation_steps: 1, max_train_steps: 6000, num_epochs: 100, checkpointing_steps: 100,
        checkpoints_total_limit: 20, max_grad_norm: 1.0, mixed_precision: bf16, gradient_checkpointing: true,
        low_memory: false}
logging: {output_dir: out, report_to: tensorboard, tracker_project_name: faces, tags: [], notes: null}
cache: {devices: {vae: cuda:0, text_encoder: cuda:0}, cache_dir: "${logging.output_dir}", use_cache: true,
        prompt_empty_drop_keys: [empty_prompt_embeds]}
predict: {devices: {vae: cuda:0, dit: cuda:1}}
resume: null
validation: {enabled: true, steps: 200, max_samples: 4, seed: 7,
             samples: [{prompt: a face, images: [face.png], controls_size: [[832, 576]], height: 832, width: 576}]}
"""
LEGACY = """\
model: {pretrained_model_name_or_path: eramth/flux-kontext-4bit-fp4, rank: 8, quantize: false,
        lora: {adapter_name: lora_edit}}
data: {class_path: src.data.dataset.ImageDataset, init_args: {dataset_path: /data/train/, image_size: [864, 1048],
       cache_drop_rate: 0.1, random_crop: false, crop_size: 1024, crop_scale: [0.8, 1.0], center_crop: true,
       center_crop_ratio: 1.0}}
optimizer: {class_path: bnb.optim.Adam8bit}
train: {trainer: FluxKontext, low_memory: true, vae_encoder_device: cuda:1, text_encoder_device: cuda:1,
        resume_from_checkpoint: null}
cache: {vae_encoder_device: cuda:1, text_encoder_device: cuda:1, text_encoder_2_device: cuda:1,
        prompt_empty_drop_keys: [prompt_embed, pooled_prompt_embed]}
predict: {devices: {vae: a, text_encoder: b, text_encoder_2: c, transformer: d}}
logging: {logging_dir: logs, sampling: {enable: false, validation_steps: 100, num_samples: 4}}
validation: {validation_steps: 50, num_validation_samples: 2}
"""


@pytest.fixture
def old(tmp_path, monkeypatch):
    """An old file in its own folder, with the pictures its samples name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "old"
    (folder / "pairs").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(folder / "face.png")

    def write(text: str):
        file = folder / "old.yaml"
        file.write_text(text)
        return file

    return write


def test_every_rule_names_a_key_of_this_version_and_none_is_one():
    for name, rule in RULES.items():
        assert not is_known(tuple(name.split("."))), name
        assert bool(rule.new) != bool(rule.why), name
        assert rule.new is None or is_known(tuple(rule.new.split("."))), name


@pytest.mark.parametrize("text", [CURRENT, LEGACY], ids=["current", "legacy"])
def test_an_old_file_gives_one_message_with_every_moved_key(old, text):
    file = old(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    first, *lines, last = caught.value.problems
    assert "layout of an earlier version" in first
    assert last == f"write the new file with: python -m qflux.migrate {file}"
    assert f"{file}:{text[: text.index('class_path')].count(chr(10)) + 1}: data.class_path is gone: " in "\n".join(
        lines
    )
    assert any("data.init_args.dataset_path is now data.dataset_path" in line for line in lines)
    assert not any("batch_size" in line for line in lines)
    if text is CURRENT:
        assert any("loss.forground_weight is now train.loss.foreground_weight" in line for line in lines)
        assert any("optimizer.init_args.amsgrad is gone: it is no key of this version" in line for line in lines)
        assert any("qfluxutils.hugginface is now qflux.utils.huggingface" in line for line in lines)


def test_the_current_old_layout_is_rewritten(old, capsys):
    file = old(CURRENT)
    new = file.parent.parent / "new.yaml"
    assert main([str(file), "-o", str(new)]) == 0
    config = load_config(new)
    hub, more, local = config.data.dataset_path
    assert (hub.repo_id, more.repo_id, local.path) == ("owner/faces", "owner/more", file.parent / "pairs")
    assert (config.model.lora.r, config.model.lora.lora_alpha) == (16, 32)
    assert config.model.lora.target_modules == ("to_k", "to_out.0")
    assert (config.data.target_size, config.data.controls_size) == ((832, 576), ((832, 576),))
    loss, optimizer, schedule = config.train.loss, config.train.optimizer, config.train.lr_scheduler
    assert (loss.mask_loss, loss.foreground_weight, loss.background_weight) == (True, 3.0, 1.0)
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.weight_decay) == (
        "adamw8bit",
        1e-4,
        (0.9, 0.98),
        0,
    )
    assert (schedule.name, schedule.warmup_steps, schedule.num_cycles) == ("cosine", 50, 0.5)
    assert (config.train.trainer, config.train.gradient_checkpointing) == ("QwenImageEdit", "full")
    assert config.model.quantize == "quanto-fp8"
    assert config.cache.cache_dir == config.logging.output_dir
    validation = config.logging.validation
    (sample,) = validation.samples
    assert (validation.steps, validation.seed, sample.prompt, sample.size) == (200, 7, "a face", (832, 576))
    assert sample.controls == (file.parent / "face.png",)

    printed, text = capsys.readouterr().out, new.read_text()
    for dropped in ("data.shuffle", "train.num_epochs", "predict", "optimizer.init_args.amsgrad"):
        assert f"# dropped {dropped}: " in text
        assert f"dropped  {dropped}: " in printed
    assert "moved    trainer -> train.trainer" in printed


def test_the_legacy_layout_is_rewritten(old):
    file = old(LEGACY)
    assert main([str(file)]) == 0
    config = load_config(file.with_name("old.new.yaml"))
    assert config.model.lora.r == config.model.lora.lora_alpha == 8
    assert (config.data.target_size, config.data.caption_dropout_rate) == ((864, 1048), 0.1)
    assert (config.train.trainer, config.train.optimizer.name) == ("FluxKontext", "adamw8bit")
    assert config.logging.validation.steps is None


def test_an_existing_file_is_never_overwritten(old, capsys):
    file = old(LEGACY)
    new = file.with_name("mine.yaml")
    new.write_text("mine")
    assert main([str(file), "-o", str(new)]) == 2
    assert new.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert main([str(file), "-o", str(file)]) == 2
    assert file.read_text() == LEGACY


def test_a_file_of_this_version_is_left_alone(old, capsys):
    file = old("model: {pretrained_model_name_or_path: a/b}\ndata: {dataset_path: x}\ntrain: {trainer: T}\n")
    assert main([str(file)]) == 2
    assert "use it as it is" in capsys.readouterr().err
    assert not file.with_name("old.new.yaml").exists()


def test_what_is_missing_or_cannot_be_written_is_said(old, capsys, tmp_path):
    file = old("trainer: T\nmodel: {rank: 4}\n")
    assert main([str(file)]) == 2
    assert "model.pretrained_model_name_or_path: missing" in capsys.readouterr().err
    assert main([str(file), "-o", str(tmp_path / "none" / "x.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert main([str(old("a: 1\na: 2\ntrainer: T\n"))]) == 2
    assert "written twice" in capsys.readouterr().err


def test_values_this_version_refuses_are_dropped_with_the_reason():
    text = """
trainer: T
model: {pretrained_model_name_or_path: a/b, rank: 4, lora: {r: 8}}
data:
  init_args:
    dataset_path: x
    processor: {init_args: {multi_resolutions: {target: [262144, 512, "768*512"], controls: [[1]]}}}
loss: {class_path: qflux.losses.MaskEditLoss, init_args: {forground_weight: 4.0}}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0}}
lr_scheduler: {scheduler_type: constant, warmup_steps: 5}
logging: {report_to: all}
validation: {enabled: true, samples: none}
"""
    result = migrate(parse(text).value)
    dropped = dict(result.dropped)
    assert dropped["model.rank"] == "model.lora.r is given"
    assert "is no optimizer" in dropped["optimizer.class_path"]
    assert "expected a number above 0" in dropped["train.optimizer.lr"]
    assert "constant_with_warmup" in dropped["train.lr_scheduler.warmup_steps"]
    assert "tensorboard, wandb" in dropped["logging.report_to"]
    assert dropped["validation.samples"] == "it was no list"
    assert result.get("data.multi_resolutions") == [512, 512, "768*512"]
    assert result.get("train.loss") == {"mask_loss": True, "foreground_weight": 4.0}
    assert result.get("logging.validation.steps") == 200


def test_an_old_key_on_the_command_line_is_explained(old):
    file = old("model: {pretrained_model_name_or_path: a/b}\ndata: {dataset_path: x}\ntrain: {trainer: T}\n")
    with pytest.raises(UserError, match=r"command line: loss\.forground_weight is now train\.loss\.foreground_weight"):
        load_config(file, ["loss.forground_weight=3"])
