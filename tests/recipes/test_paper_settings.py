"""What the paper's benchmark trains with, as numbers: a run with other ones would not be told by its loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, HfArgumentParser

from .image_assets import save_parquet
from .launching import built, complaint, recipe, run_here, weights

SMALL = {"pair": "resnet20-resnet8", "image_size": 16, "per_device_train_batch_size": 64}
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of CIFAR-100's colours


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for the data: 480 and 120 images of digits."""
    files = save_parquet(tmp_path_factory.mktemp("digits"))
    return {f"{split}_file": str(path) for split, path in files.items()}


def cross_entropy(**options: Any) -> Any:
    """A trainer without a teacher."""
    return built("paper_cifar100", **options, dkd_alpha=0.0, dkd_beta=0.0)[0]


# ---- Optimizer ----


@pytest.mark.parametrize(("pair", "rate"), [("resnet32x4-resnet8x4", 0.05), ("vgg13-mobilenet_v2", 0.01)])
def test_the_optimizer_is_the_papers(pair: str, rate: float, digits: dict[str, Any], tmp_path: Path) -> None:
    trainer = cross_entropy(**digits, pair=pair, image_size=16, output_dir=tmp_path)
    trainer.create_optimizer_and_scheduler(100)
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    names = ("lr", "momentum", "weight_decay", "nesterov", "dampening")
    assert [group[name] for name in names] == [rate, 0.9, 5e-4, False, 0]
    assert len(group["params"]) == len(list(trainer.model.parameters()))
    assert (trainer.args.optim, trainer.args.lr_scheduler_type) == ("sgd", "constant")  # which the model card tells


@pytest.mark.parametrize(("pair", "batch"), [("resnet32x4-resnet8x4", 64), ("resnet34-resnet18", 512)])
def test_the_batch_is_divided_among_the_processes(
    pair: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = recipe("paper_options").PaperTrainingArguments
    for processes in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        published = recipe("paper_presets").published(pair, "dkd", 240)
        assert published["per_device_train_batch_size"] == batch // processes
    monkeypatch.delenv("WORLD_SIZE")
    assert arguments(str(tmp_path), pair=pair, use_cpu=True).per_device_train_batch_size == batch


# ---- Losses ----


@pytest.mark.parametrize(("pair", "beta"), [("resnet34-resnet18", 0.5), ("resnet50-mobilenet_v1", 2)])
def test_imagenet_has_the_weights_and_the_warm_up_of_the_paper(pair: str, beta: float) -> None:
    def settings(**options: Any) -> tuple[float, ...]:
        """Cross-entropy's weight, α, β, temperature and epochs of warm-up."""
        parser = HfArgumentParser(recipe("paper_cifar100").ARGUMENTS)
        _, args = parser.parse_dict({"pair": pair, "use_cpu": True} | options)
        assert args.dkd_warmup_staircase
        numbers = args.ce_weight, args.dkd_alpha, args.dkd_beta, args.dkd_temperature
        return *numbers, args.dkd_warmup_epochs, args.dkd_weight(1, 1000, 10)

    # Last, the weight at the first of ten steps of an epoch: with the staircase that of the whole epoch.
    assert settings() == (1, 1, beta, 1, 1, 1)
    assert settings(num_train_epochs=400) == (1, 1, beta, 1, 4, 0.25)
    assert settings(distillation="kd") == (0.5, 0.5, 1, 1, 0, 1)
    assert settings(distillation="kd", kd_warmup=True, num_train_epochs=200) == (0.5, 0.5, 1, 1, 2, 0.5)


# ---- Images ----


def test_views_of_cifar_are_those_of_the_paper(digits: dict[str, Any], tmp_path: Path) -> None:
    trainer = cross_entropy(**digits, output_dir=tmp_path, seed=7)
    train, test = trainer.train_dataset, trainer.eval_dataset
    assert (train.padding, train.mirror, train.seed) == (4, True, 7)
    assert (test.padding, test.mirror) == (0, False)
    for data in (train, test):
        assert (data.height, data.width) == (32, 32)
        assert (data.mean / 255).tolist() == pytest.approx(MEAN)
        assert (data.std / 255).tolist() == pytest.approx(STD)
    assert (trainer.processing_class.image_mean, trainer.processing_class.image_std) == (MEAN, STD)
    assert cross_entropy(**digits, image_size=16, output_dir=tmp_path).train_dataset.padding == 2


def test_images_on_the_device_need_no_workers(digits: dict[str, Any], tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True}
    options = digits | {"image_size": 16, "output_dir": tmp_path, "max_train_samples": 64, "num_train_epochs": 1}
    trainer, _ = built(
        "paper_cifar100", pair="resnet20-resnet8", **options, **workers, teacher_model_name_or_path=tmp_path / "teacher"
    )
    assert (trainer.args.dataloader_num_workers, trainer.get_train_dataloader().num_workers) == (0, 0)


def test_imagenet_is_seen_in_its_middle(tmp_path: Path) -> None:
    """The shorter side as 256 pixels, and of these the 224 in the middle (of twice the size, to be exact)."""
    grey = np.tile(np.arange(512, dtype=np.float64) / 2, (512, 1)).astype(np.uint8)  # 0 to 255 from left to right
    picture = np.stack([grey, grey.T, np.zeros_like(grey)], axis=2)
    wide = np.concatenate([np.full((512, 100, 3), 255, np.uint8), picture, np.full((512, 100, 3), 255, np.uint8)], 1)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(wide).save(tmp_path / split / label / "0.png")
    config = AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "teacher")
    options = {"pair": "resnet34-resnet18", "dataset_name": tmp_path, "output_dir": tmp_path / "out"}
    trainer, splits = built("paper_cifar100", **options, teacher_model_name_or_path=tmp_path / "teacher")
    seen = np.asarray(splits["validation"][0]["image"]).astype(int)
    wanted = 16 + np.arange(224) + 0.25  # means of the two bytes that are one pixel of 256
    assert np.abs(seen[:, :, 0] - wanted).max() <= 1
    assert np.abs(seen[:, :, 1] - wanted[:, None]).max() <= 1
    batch = next(iter(trainer.get_eval_dataloader()))["pixel_values"]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for colour in range(3):
        torch.testing.assert_close(
            batch[0, colour].numpy(), (seen[:, :, colour] / 255 - mean[colour]) / std[colour], rtol=0, atol=1e-5,
            check_dtype=False,
        )  # fmt: skip


def test_mobilenet_v1_starts_as_the_authors_does() -> None:
    model = recipe("paper_trainer").make_model("mobilenet_v1", [str(number) for number in range(100)])
    layers = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)]
    for layer in layers:
        weight = layer.weight.detach()
        if weight.numel() > 4000:  # uniform up to 1 / √(fan-in)
            bound = weight[0].numel() ** -0.5
            assert float(weight.abs().max()) == pytest.approx(bound, rel=0.01)
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert len(layers) == 28
    assert any(layers[-1].bias.tolist())


# ---- Ablations ----


def test_every_ablation_has_its_settings(tmp_path: Path) -> None:
    compare, file = recipe("compare"), Path(recipe("compare").__file__).with_name("paper_ablations.yaml")
    content = yaml.safe_load(file.read_text())
    (settings,) = HfArgumentParser(compare.CompareArguments).parse_dict(content)
    assert (settings.recipe, settings.seeds, settings.rivals) == ("paper_cifar100.py", 5, ["kd", "dkd"])
    found = {}
    for method in settings.methods:
        given = compare.settings_of(method) | {"num_train_epochs": 60, "use_cpu": True, "output_dir": str(tmp_path)}
        data, args = HfArgumentParser(recipe("paper_cifar100").ARGUMENTS).parse_dict(given)
        numbers = args.ce_weight, args.dkd_alpha, args.dkd_beta, args.dkd_warmup_epochs
        found[method] = args.distillation, *numbers, data.label_noise, data.auto_augment
        assert (args.dkd_temperature, args.dkd_warmup_staircase, args.pair) == (4, True, "resnet32x4-resnet8x4")
    # Distillation, cross-entropy's weight, α, β, warm-up of 60 epochs, noise, AutoAugment.
    wanted: dict[str, tuple[Any, ...]] = {
        "cross-entropy": ("dkd", 1, 0, 0, 5, 0, False),
        "kd": ("kd", 0.1, 0.9, 1, 0, 0, False),
        "dkd": ("dkd", 1, 1, 8, 5, 0, False),
        "dkd:dkd_beta=0": ("dkd", 1, 1, 0, 5, 0, False),
        "dkd:dkd_alpha=0": ("dkd", 1, 0, 8, 5, 0, False),
        "kd:ce_weight=1,dkd_alpha=1,kd_warmup=true": ("kd", 1, 1, 1, 5, 0, False),
    }
    wanted |= {f"dkd:dkd_alpha={alpha:g}": ("dkd", 1, alpha, 8, 5, 0, False) for alpha in (0.2, 0.5, 2, 4)}
    wanted |= {f"dkd:dkd_beta={beta}": ("dkd", 1, 1, beta, 5, 0, False) for beta in (1, 2, 4, 10)}
    for word, noise, strong in [(f"label_noise={x}", x, False) for x in (0.1, 0.2, 0.3)] + [
        ("auto_augment=true", 0, True)
    ]:
        wanted[f"cross-entropy:{word}"] = ("dkd", 1, 0, 0, 5, noise, strong)
        wanted[f"dkd:dkd_alpha=0,{word}"] = ("dkd", 1, 0, 8, 5, noise, strong)
        wanted[f"dkd:{word}"] = ("dkd", 1, 1, 8, 5, noise, strong)
    assert found == wanted


# ---- What is not followed ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim": "adamw_torch"}, "--optim adamw_torch cannot be followed: the optimizer is SGD"),
        ({"adam_beta2": 0.5}, "--adam_beta2 0.5 cannot be followed: the optimizer is SGD"),
        ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type cosine cannot be followed: the learning rate changes"),
        ({"warmup_steps": 10}, "--warmup_steps 10.* cannot be followed: the learning rate changes"),
        ({"max_steps": 3}, "--max_steps 3 cannot be followed: give --epochs, which may be below 1"),
        ({"eval_strategy": "no"}, "--eval_strategy no cannot be followed: .* leave --eval_strategy epoch"),
        ({"save_only_model": True}, "--save_only_model True cannot be followed"),
        ({"pair": "resnet34-resnet18"}, "--image_size 16 cannot be followed: the pairs of ImageNet take 224"),
        (
            {"pair": "resnet34-resnet18", "image_size": 32, "auto_augment": True},
            "--auto_augment True cannot be followed: it is for the pairs of CIFAR-100",
        ),
    ],
)
def test_what_would_be_ignored_is_refused_first(
    options: dict[str, Any], words: str, digits: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=words):
        run_here("paper_cifar100", **{**SMALL, **digits, "output_dir": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()


def test_a_warm_up_of_kd_is_for_kd(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kd_warmup is for kd, and distillation is dkd"):
        recipe("paper_options").PaperTrainingArguments(str(tmp_path), kd_warmup=True, use_cpu=True)


def test_epochs_are_above_zero(digits: dict[str, Any], tmp_path: Path) -> None:
    said = complaint("paper_cifar100.py", **SMALL, **digits, output_dir=tmp_path / "out", num_train_epochs=0)
    assert "num_train_epochs is 0.0; expected a number above 0" in said


# ---- Precision and compilation ----


def test_a_run_in_bf16_steps(digits: dict[str, Any], tmp_path: Path) -> None:
    options = {**SMALL, **digits, "num_train_epochs": 0.25, "bf16": True, "max_train_samples": 256}
    options |= {"teacher_model_name_or_path": tmp_path / "teacher", "output_dir": tmp_path / "out"}
    results = run_here("paper_cifar100", **options)
    assert 0 <= results["metrics"]["test"]["accuracy"] <= 1
    in_bf16 = weights(tmp_path / "out")
    run_here("paper_cifar100", **options | {"bf16": None, "output_dir": tmp_path / "plain"})
    in_fp32, (start, _) = weights(tmp_path / "plain"), built("paper_cifar100", **options)
    for name, value in in_bf16.items():
        assert value.dtype == in_fp32[name].dtype
        if value.is_floating_point():
            assert float((value - in_fp32[name]).norm()) < 0.05 * float(in_fp32[name].norm()) + 1e-3, name
    moved = [name for name, value in start.model.named_parameters() if not torch.equal(value, in_bf16[name])]
    assert len(moved) == len(list(start.model.parameters()))


@pytest.mark.slow
def test_a_compiled_run_is_like_a_plain_one(digits: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "num_train_epochs": 1, "max_train_samples": 150}
    options["teacher_model_name_or_path"] = tmp_path / "teacher"
    run_here("paper_cifar100", **options, output_dir=tmp_path / "plain")
    run_here("paper_cifar100", **options, output_dir=tmp_path / "compiled", torch_compile=True, teacher_compile=True)
    compiled = weights(tmp_path / "compiled")
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3, msg=name)
