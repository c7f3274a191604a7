import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from hf_dkd import Teacher
from hf_dkd.rows import logits_of
from hf_dkd.student import add_adapter, change_config, keep_layers

from .models import ARCHITECTURES

# Where the stack of layers is, and how the architecture's own config counts them.
STACKS = {
    "bert": ("bert.encoder.layer", "num_hidden_layers"),
    "distilbert": ("distilbert.transformer.layer", "n_layers"),
    "vit": ("vit.layers", "num_hidden_layers"),
    "gpt2": ("transformer.h", "n_layer"),
    "llama": ("model.layers", "num_hidden_layers"),
}


def deep(name: str, layers: int = 4) -> Any:
    """A model of several layers, no two of which have the same weights."""
    return ARCHITECTURES[name].model(**{STACKS[name][1]: layers}).eval()


def with_layers(model: Any, name: str, layers: list[int]) -> Any:
    """A copy of `model` whose other layers are taken out by hand."""
    model, path = copy.deepcopy(model), STACKS[name][0]
    stack = model.get_submodule(path)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(stack[layer] for layer in layers))
    return model


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    # The cache counts layers by the config, which removing them by hand does not change.
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return logits_of(model(**batch, **cache), "student")


@pytest.mark.parametrize("layers", [[0, 2], [3], [1, 0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", STACKS)
def test_its_logits_are_those_of_the_model_without_the_other_layers(name: str, layers: list[int]) -> None:
    model, batch = deep(name), ARCHITECTURES[name].batch()
    student = keep_layers(model, layers)
    assert type(student) is type(model)
    assert student.config.num_hidden_layers == len(student.get_submodule(STACKS[name][0])) == len(layers)
    assert model.config.num_hidden_layers == 4
    assert torch.equal(logits(student, batch), logits(with_layers(model, name, layers), batch))
    assert torch.equal(logits(student, batch), logits(model, batch)) is (layers == [0, 1, 2, 3])


@pytest.mark.parametrize("name", STACKS)
def test_it_is_a_copy_that_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, batch = deep(name), ARCHITECTURES[name].batch()
    student = keep_layers(model, [1, 3])
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}
    student.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(logits(loaded, batch), logits(student, batch))


def test_tied_weights_stay_tied() -> None:
    student = keep_layers(deep("gpt2"), [0, 3])
    assert student.lm_head.weight is student.transformer.wte.weight


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mode_dtype_and_labels_are_kept(name: str, dtype: torch.dtype, training: bool) -> None:
    model = deep(name).to(dtype).train(training)
    model.config.id2label = names = dict(enumerate(["ant", "bee", "cat", "dog", "emu"]))
    student = keep_layers(model, [2])
    assert all(module.training is training for module in student.modules())
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert student.config.id2label == names
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("layers", [[], [4], [0, 4], [-1], [0, -4]])
def test_layers_that_the_model_does_not_have_are_refused(layers: list[int]) -> None:
    with pytest.raises(
        ValueError, match=rf"layers are \[{', '.join(map(str, layers))}\]; expected numbers from 0 to 3"
    ):
        keep_layers(deep("bert"), layers)


def test_two_stacks_are_refused() -> None:
    model = ARCHITECTURES["bart"].model(encoder_layers=2, decoder_layers=2)
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration has 2 stacks of 2 layers; .* exactly one"):
        keep_layers(model, [0])


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("model_class", "config", "setting", "kept"),
    [
        (tf.Qwen2ForCausalLM, {"num_key_value_heads": 1}, "layer_types", ["full_attention"] * 2),
        (
            tf.ModernBertForMaskedLM,
            {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
            "layer_types",
            ["full_attention", "sliding_attention"],
        ),
        (tf.SmolLM3ForCausalLM, {"num_key_value_heads": 1, "no_rope_layers": [1, 0, 0, 1]}, "no_rope_layers", [1, 0]),
    ],
)
def test_settings_of_each_layer_go_with_it(model_class: Any, config: dict, setting: str, kept: list) -> None:
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SMALL | config)).eval()
    student = keep_layers(model, [0, 2])
    assert getattr(student.config, setting) == kept
    ids = torch.arange(8).reshape(1, 8) + 3
    with torch.no_grad():
        assert student(ids).logits.shape == (1, 8, 64)
        torch.testing.assert_close(keep_layers(model, [0, 1, 2, 3])(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_names_that_follow_from_the_number_of_layers_are_made_anew(tmp_path: Path) -> None:
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32}
    config = tf.BeitConfig(**vision, num_hidden_layers=4, num_attention_heads=2)
    keep_layers(tf.BeitForImageClassification(config), [0, 3]).save_pretrained(tmp_path)
    assert tf.BeitForImageClassification.from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_a_changed_config_derives_what_follows_and_leaves_the_first_alone() -> None:
    config = tf.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], num_labels=5)
    changed: Any = change_config(config, {"depths": [2, 1], "hidden_sizes": [4, 6]})
    assert (changed.depths, changed.hidden_sizes, changed.num_labels) == ([2, 1], [4, 6], 5)
    assert changed.stage_names == ["stem", "stage1", "stage2"]
    assert config.depths == [1, 1, 1, 1]
    assert tf.ResNetForImageClassification(changed)(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5)


def test_settings_that_the_config_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="ViTConfig has no hidden_sise, deep to change"):
        change_config(tf.ViTConfig(), {"hidden_sise": 8, "deep": True, "patch_size": 4})


LORA = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)


def test_an_adapter_is_all_that_is_trained_and_saved_beside_one_that_teaches(tmp_path: Path) -> None:
    batch = ARCHITECTURES["bert"].batch()
    torch.manual_seed(1)
    taught = add_adapter(deep("bert"), LORA)
    assert {name for name, p in taught.named_parameters() if not p.requires_grad} >= {
        name for name, _ in taught.named_parameters() if "base_layer" in name
    }
    taught.eval().save_pretrained(tmp_path / "expert")

    student = add_adapter(deep("bert"), LORA, tmp_path / "expert").eval()
    assert student.active_adapter == "default"
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in student.named_parameters() if ".default." in name}
    assert torch.equal(Teacher.from_adapter(student, "teacher").logits(batch), logits(taught, batch))

    student.save_pretrained(tmp_path / "student")
    assert [path.parent.name for path in tmp_path.glob("student/**/adapter_model.safetensors")] == ["student"]
    loaded = PeftModel.from_pretrained(deep("bert"), tmp_path / "student").eval()
    assert torch.equal(logits(loaded, batch), logits(student, batch))
    assert not torch.equal(logits(student, batch), logits(taught, batch))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Can't find 'adapter_config"):
        add_adapter(deep("bert"), LORA, tmp_path)
