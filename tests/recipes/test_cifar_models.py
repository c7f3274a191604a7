from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification

from hf_dkd import DKDTrainer, DKDTrainingArguments
from hf_dkd.heads import Head, head_of

from .launching import recipe

cifar_models = recipe("cifar_models")

# Parameters for 100 classes, and multiply-adds of the convolutions and the linear layer for an image of 32×32, both as
# the code of the benchmark comes to (https://github.com/HobbitLong/RepDistiller, models/).
PARAMETERS_AND_MULTIPLY_ADDS = {
    "resnet8": (83_892, 12_507_392),
    "resnet14": (181_108, 26_663_168),
    "resnet20": (278_324, 40_818_944),
    "resnet32": (472_756, 69_130_496),
    "resnet56": (861_620, 125_753_600),
    "resnet110": (1_736_564, 253_155_584),
    "resnet8x4": (1_233_540, 177_071_104),
    "resnet32x4": (7_433_860, 1_083_040_768),
    "resnet50": (23_705_252, 1_298_014_208),
    "wrn_16_2": (703_284, 101_118_464),
    "wrn_40_1": (569_780, 83_286_272),
    "wrn_40_2": (2_255_156, 327_610_880),
    "vgg8": (3_965_028, 96_192_512),
    "vgg13": (9_462_180, 284_936_192),
    "mobilenet_v2": (812_836, 6_523_648),
    "shufflenet_v1": (949_258, 38_691_456),
    "shufflenet_v2": (1_355_528, 44_504_448),
}

# Millions of multiply-adds for 10 classes in tables of others, and half a unit of their last digit:
# https://github.com/chenyaofo/pytorch-cifar-models and https://github.com/da2so/DA2Lite (model_zoo).
OTHERS_MULTIPLY_ADDS = {"resnet20": (40.81, 0.005), "resnet32": (69.12, 0.005), "resnet50": (1300, 5)}

# A model of each family, with the channels that its feature maps have: of the stem, then of each stage.
FAMILIES = {
    "resnet8": [16, 16, 32, 64],
    "wrn_16_2": [16, 32, 64, 128],
    "vgg8": [64, 128, 256, 512, 512],
    "mobilenet_v2": [16, 8, 12, 16, 32, 48, 80, 160],
    "shufflenet_v1": [24, 240, 480, 960],
    "shufflenet_v2": [24, 116, 232, 464],
}


def model_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(cifar_models.config_of(name, **changes))


def multiply_adds(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def images(size: int = 16, number: int = 4) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_architecture_has_published_counts() -> None:
    assert list(cifar_models.ARCHITECTURES) == list(PARAMETERS_AND_MULTIPLY_ADDS)


@pytest.mark.parametrize("name", PARAMETERS_AND_MULTIPLY_ADDS)
def test_parameters_and_multiply_adds_are_the_published_ones(name: str) -> None:
    model = model_of(name)
    assert (model.num_parameters(), multiply_adds(model)) == PARAMETERS_AND_MULTIPLY_ADDS[name]


@pytest.mark.parametrize("name", OTHERS_MULTIPLY_ADDS)
def test_multiply_adds_round_to_what_others_count(name: str) -> None:
    published, half_a_unit = OTHERS_MULTIPLY_ADDS[name]
    assert multiply_adds(model_of(name, num_labels=10)) / 1e6 == pytest.approx(published, abs=half_a_unit)


@pytest.mark.parametrize("name", PARAMETERS_AND_MULTIPLY_ADDS)
def test_forward_and_backward(name: str) -> None:
    model, labels = model_of(name), torch.tensor([0, 99, 5, 5])
    outputs = model(images(), labels=labels)
    assert outputs.logits.shape == (4, 100)
    assert torch.equal(outputs.loss, cross_entropy(outputs.logits, labels))
    outputs.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.count_nonzero() > 0, parameter_name
    assert head_of(model) is Head.CLASSIFICATION


@pytest.mark.parametrize("name", PARAMETERS_AND_MULTIPLY_ADDS)
def test_a_saved_model_is_the_same_when_loaded(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    with torch.no_grad():
        model(images())  # Moves the running statistics of the batch normalisation.
        model.eval().save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert not loaded.training
        # A copy: weights mapped from the file lie at odd addresses, where kernels sum in another order.
        assert torch.equal(deepcopy(loaded)(images(32, 1)).logits, model(images(32, 1)).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == loaded.config.to_diff_dict()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_for_other_classes_starts_afresh_on_a_loaded_body(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    with torch.no_grad():
        model(images())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=10, ignore_mismatched_sizes=True)
    for key, value in loaded.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(value, model.state_dict()[key]), key
    weight, fresh = loaded.classifier.weight.detach(), model_of(name, num_labels=10).classifier.weight.detach()
    assert weight.shape == fresh.shape
    assert float(weight.std()) == pytest.approx(float(fresh.std()), rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_tuples_on_request(name: str) -> None:
    model = model_of(name).eval()
    with torch.no_grad():
        outputs = model(images(32), output_hidden_states=True)
        assert model(images(32)).hidden_states is None
        (logits,) = model(images(32), return_dict=False)
        assert [maps.shape[1] for maps in outputs.hidden_states] == FAMILIES[name]
        pooled = model.tail(outputs.hidden_states[-1]).mean((2, 3))
        assert torch.equal(model.classifier(pooled), outputs.logits)
    assert torch.equal(logits, outputs.logits)
    assert (pooled >= 0).all()  # The pooling follows a ReLU.


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_weights_are_those_of_the_published_code(name: str) -> None:
    first, second = model_of(name), model_of(name)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    for module in first.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            area = module.kernel_size[0] ** 2
            if name.startswith("shufflenet"):  # Uniform, as PyTorch has it.
                expected = (3 * area * module.in_channels / module.groups) ** -0.5
            else:
                expected = (2 / (area * module.out_channels)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.06)
            assert module.bias is None or not module.bias.any()
    weight, bias = first.classifier.weight.detach(), first.classifier.bias
    narrow = name in ("vgg8", "mobilenet_v2")
    expected = 0.01 if narrow else (3 * weight.shape[1]) ** -0.5
    assert float(weight.std()) == pytest.approx(expected, rel=0.03)
    assert bool(bias.any()) == (not narrow and name != "wrn_16_2")


def test_unknown_names_and_depths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet21'; expected one of resnet8, .*shufflenet_v2\."):
        cifar_models.config_of("resnet21")
    with pytest.raises(ValueError, match=r"depth is 17; expected 6n \+ 4"):
        model_of("wrn_16_2", depth=17)


def test_they_distil_without_a_word_on_their_head(tmp_path: Path) -> None:
    teacher = model_of("resnet20")
    teacher.save_pretrained(tmp_path / "teacher")
    args = DKDTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, learning_rate=0.0,
    )  # fmt: skip
    train = [{"pixel_values": image, "labels": i} for i, image in enumerate(images(number=8))]
    student = model_of("resnet8")
    histories = []
    for given in (teacher, tmp_path / "teacher"):
        trainer = DKDTrainer(student, args, train_dataset=train, teacher=given)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(histories[0]) == 2
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
