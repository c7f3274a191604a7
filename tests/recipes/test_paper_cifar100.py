"""The paper's benchmark: presets, schedule, slices."""

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForImageClassification

# By way of the package, 5.17 asks for torchvision: https://github.com/huggingface/transformers/issues/48607
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .image_assets import save_folder, save_parquet
from .launching import built, command, complaint, environment, kill_after_checkpoint, launch, recipe, run_here, weights

PAIRS = {  # β and learning rate, as published
    "resnet56-resnet20": (2, 0.05), "resnet110-resnet32": (2, 0.05), "resnet32x4-resnet8x4": (8, 0.05),
    "wrn_40_2-wrn_16_2": (6, 0.05), "wrn_40_2-wrn_40_1": (6, 0.05), "vgg13-vgg8": (6, 0.05),
    "resnet32x4-shufflenet_v1": (8, 0.01), "wrn_40_2-shufflenet_v1": (8, 0.01), "vgg13-mobilenet_v2": (6, 0.01),
    "resnet50-mobilenet_v2": (8, 0.01), "resnet32x4-shufflenet_v2": (8, 0.01),
}  # fmt: skip
SMALL = {"pair": "resnet20-resnet8", "image_size": 16, "per_device_train_batch_size": 64}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for the data: 480 and 120 images of digits, named as CIFAR-100 names its columns."""
    files = save_parquet(tmp_path_factory.mktemp("digits"))
    return {f"{split}_file": str(path) for split, path in files.items()}


def untrained(folder: Path, name: str, size: int = 10) -> str:
    """A teacher with random weights."""
    torch.manual_seed(1)
    config = recipe("cifar_models").config_of(name, num_labels=size, id2label={i: str(i) for i in range(size)})
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    recipe("cifar_models")
    return untrained(tmp_path_factory.mktemp("teacher"), "resnet20")


# ---- Presets ----


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_has_its_published_settings_and_takes_a_step(pair: str, digits: dict[str, Any], tmp_path: Path) -> None:
    teacher = untrained(tmp_path / "teacher", pair.split("-")[0])
    options = {"pair": pair, "image_size": 16, "max_train_samples": 64, "max_eval_samples": 8, "max_steps": 1}
    trainer, _ = built("paper_cifar100", **options, **digits, teacher_model_name_or_path=teacher, output_dir=tmp_path)
    args = trainer.args
    settings = (args.dkd_beta, args.learning_rate, args.dkd_alpha, args.dkd_temperature, args.ce_weight)
    assert settings == (*PAIRS[pair], 1, 4, 1)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.weight_decay) == (240, 64, 5e-4)
    assert (args.dkd_warmup_epochs, args.dkd_warmup_staircase, args.max_grad_norm) == (20, True, 0)
    args.eval_strategy = args.save_strategy = "no"
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["nesterov"]) == (PAIRS[pair][1], 0.9, False)
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    moved = [not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters()]
    assert sum(moved) > 0.95 * len(moved)
    assert len(group["params"]) == len(moved)
    assert (trainer.teacher.model.num_parameters(), trainer.model.num_parameters()) == tuple(
        AutoModelForImageClassification.from_config(
            recipe("cifar_models").config_of(name, num_labels=10)
        ).num_parameters()
        for name in pair.split("-")
    )


@pytest.mark.parametrize(
    ("pair", "beta", "size"), [("resnet34-resnet18", 0.5, 11.2e6), ("resnet50-mobilenet_v1", 2, 3.2e6)]
)
def test_a_pair_of_imagenet_takes_a_step(pair: str, beta: float, size: float, tmp_path: Path) -> None:
    config = AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    config.id2label = {number: f"class {number}" for number in range(10)}  # folders have other names
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "teacher")
    options = {"pair": pair, "max_train_samples": 4, "max_eval_samples": 4, "max_steps": 1, "output_dir": tmp_path}
    options |= {"dataset_name": save_folder(tmp_path / "digits"), "teacher_model_name_or_path": tmp_path / "teacher"}
    trainer, splits = built("paper_cifar100", **options, eval_strategy="no", save_strategy="no")
    args = trainer.args
    assert (args.dkd_beta, args.dkd_alpha, args.dkd_temperature, args.dkd_warmup_epochs) == (beta, 1, 1, 1)
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (100, 512)
    assert (args.learning_rate, args.weight_decay) == (0.2, 1e-4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 224, 224)
    assert splits["test"][0]["image"].size == (224, 224)
    assert trainer.model.num_parameters() == pytest.approx(size, rel=0.02)
    assert {part.momentum for part in trainer.model.modules() if isinstance(part, torch.nn.BatchNorm2d)} == {0.1}
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    assert milestones(trainer, 1000) == [300, 600, 900]


def milestones(trainer: Any, steps: int) -> list[int]:
    """The steps after which the learning rate of a training of so many falls to a tenth."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.create_optimizer_and_scheduler(steps)
    found, rate = [], trainer.args.learning_rate
    for step in range(1, steps + 1):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        now = trainer.lr_scheduler.get_last_lr()[0]
        if now != rate:
            assert now == pytest.approx(rate / 10)
            found.append(step)
        rate = now
    return found


@pytest.mark.parametrize(("epochs", "warmup"), [(240, 20), (60, 5), (12, 1), (30, 2.5)])
def test_epochs_rescale_the_milestones_and_the_warm_up(
    epochs: int, warmup: float, digits: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    options = {"num_train_epochs": epochs, "teacher_model_name_or_path": teacher, "output_dir": tmp_path}
    trainer, _ = built("paper_cifar100", **SMALL, **digits, **options)
    each = 10  # steps an epoch
    assert milestones(trainer, epochs * each) == [round(epochs * each * share / 240) for share in (150, 180, 210)]
    weights = [trainer.args.dkd_weight(step, epochs * each, each) for step in range(1, epochs * each + 1)]
    assert weights == pytest.approx([min(1, epoch / warmup) for epoch in range(1, epochs + 1) for _ in range(each)])


def test_classical_distillation_has_the_weights_of_the_paper(
    digits: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "teacher_model_name_or_path": teacher, "output_dir": tmp_path}
    args = built("paper_cifar100", **options, distillation="kd")[0].args
    assert (args.ce_weight, args.dkd_alpha, args.dkd_temperature, args.dkd_warmup_epochs) == (0.1, 0.9, 4, 0)
    args = built("paper_cifar100", **options, distillation="kd", ce_weight=1.0, dkd_alpha=1.0)[0].args
    assert (args.ce_weight, args.dkd_alpha) == (1, 1)
    args = built("paper_cifar100", **options, dkd_alpha=0.0, dkd_beta=0.0)[0].args
    assert (args.ce_weight, args.dkd_alpha, args.dkd_beta) == (1, 0, 0)


# ---- Data ----


def test_noise_moves_a_share_of_the_labels_to_other_classes(
    digits: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "teacher_model_name_or_path": teacher, "output_dir": tmp_path}
    clean, noisy, again = (
        built("paper_cifar100", **options, label_noise=share, seed=seed)[0].train_dataset.labels
        for share, seed in ((0.0, 0), (0.3, 0), (0.3, 1))
    )
    assert 0.23 < float((clean != noisy).float().mean()) < 0.37
    assert torch.equal(noisy, again)
    assert set(noisy.tolist()) == set(range(10))
    labels = recipe("paper_data").noisy(torch.full((9000,), 3), 10, 1.0, seed=0)
    counts = torch.bincount(labels, minlength=10)
    assert counts[3] == 0
    assert all(850 < count < 1150 for number, count in enumerate(counts.tolist()) if number != 3)
    _, splits = built("paper_cifar100", **options, label_noise=0.3)
    assert torch.equal(splits["test"].labels, built("paper_cifar100", **options)[1]["test"].labels)


def test_strong_augmentation_keeps_labels_and_sizes(digits: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "teacher_model_name_or_path": teacher, "output_dir": tmp_path}
    plain = built("paper_cifar100", **options)[0]
    strong = built("paper_cifar100", **options, auto_augment=True, max_steps=2)[0]
    batch = next(iter(strong.get_train_dataloader()))
    assert batch["pixel_values"].shape == (64, 3, 16, 16)
    assert torch.equal(batch["labels"], next(iter(plain.get_train_dataloader()))["labels"])
    assert torch.equal(torch.tensor(strong.train_dataset.rows["labels"]), plain.train_dataset.labels)
    # Evaluation does not change: the same images through the processor and from the device.
    pair = [next(iter(trainer.get_eval_dataloader()))["pixel_values"] for trainer in (strong, plain)]
    torch.testing.assert_close(*pair, rtol=0, atol=0.05)
    strong.train()
    assert np.isfinite(strong.state.log_history[0]["loss"])


# ---- Runs ----


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_trains_the_teacher_once_and_leaves_what_recipes_leave(
    processes: int, digits: dict[str, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "num_train_epochs": 2, "learning_rate": 0.1}
    options |= {"teacher_model_name_or_path": tmp_path / "teacher", "teacher_epochs": 3, "output_dir": tmp_path / "one"}
    options["per_device_train_batch_size"] = 64 // processes
    results = launch("paper_cifar100.py", processes, **options)
    state = json.loads((tmp_path / "teacher/trainer_state.json").read_text())
    assert (state["epoch"], state["global_step"]) == (3, 24)
    assert {entry["learning_rate"] for entry in state["log_history"][:5] if "learning_rate" in entry} == {0.05}
    recipe("cifar_models")  # which makes them known
    loaded = [AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("teacher", "one")]
    assert [model.config.depths[0] for model in loaded] == [3, 1]
    assert AutoImageProcessor.from_pretrained(tmp_path / "one").image_mean == pytest.approx([0.5071, 0.4867, 0.4408])
    epochs = json.loads((tmp_path / "one/trainer_state.json").read_text())["log_history"]
    told = [entry["eval_accuracy"] for entry in epochs if "eval_accuracy" in entry]
    assert len(told) == 2
    assert results["metrics"]["test"]["accuracy"] == pytest.approx(told[-1])
    rows = load_dataset("parquet", data_files=str(tmp_path / "one/predictions.parquet"), split="train")
    hits = np.equal(rows["label"], rows["prediction"])
    assert len(hits) == 120
    assert hits.mean() == pytest.approx(told[-1])
    if processes == 1:
        written = (tmp_path / "teacher/model.safetensors").stat().st_mtime_ns
        run_here("paper_cifar100", **options | {"output_dir": tmp_path / "two", "num_train_epochs": 1})
        assert (tmp_path / "teacher/model.safetensors").stat().st_mtime_ns == written


def test_a_folder_is_kept_for_one_training(
    digits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "num_train_epochs": 1, "max_train_samples": 64}
    options |= {"teacher_model_name_or_path": tmp_path / "teacher", "output_dir": tmp_path / "out"}
    run_here("paper_cifar100", **options)
    run_here("paper_cifar100", **options, minutes=10)  # done already
    with pytest.raises(SystemExit, match=r"out holds a training with distillation None and not kd"):
        run_here("paper_cifar100", **options, distillation="kd")
    other = options | {"output_dir": tmp_path / "other", "num_train_epochs": 2}
    with pytest.raises(SystemExit, match=r"teacher holds a training with teacher_epochs 1.0 and not 2.0"):
        run_here("paper_cifar100", **other)
    run_here("paper_cifar100", **other, teacher_epochs=1)
    # One that was interrupted while it was saved is trained to its end again.
    (tmp_path / "teacher/trainer_state.json").unlink()
    before = (tmp_path / "teacher/model.safetensors").stat().st_mtime_ns
    run_here("paper_cifar100", **other | {"output_dir": tmp_path / "third"}, teacher_epochs=1)
    assert (tmp_path / "teacher/model.safetensors").stat().st_mtime_ns > before


def test_slices_of_one_step_end_where_a_whole_run_ends(
    digits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        **SMALL,
        **digits,
        "num_train_epochs": 2,
        "max_train_samples": 250,
        "ignore_data_skip": False,
    }
    whole = options | {"output_dir": tmp_path / "whole", "teacher_model_name_or_path": tmp_path / "whole/teacher"}
    run_here("paper_cifar100", **whole)
    sliced = options | {"output_dir": tmp_path / "sliced", "teacher_model_name_or_path": tmp_path / "sliced/teacher"}
    slices = 0
    while not (tmp_path / "sliced/results.json").exists():
        slices += 1
        with suppress(SystemExit):
            run_here("paper_cifar100", **sliced, minutes=1e-9)
        assert slices < 20
    assert slices == 15  # four steps an epoch, two epochs, two models; the last step of each ends its training
    assert "Out of time at step 1 of 8: the same command goes on from there." in capsys.readouterr().out
    for folder in ("teacher", "."):
        pair = [weights(tmp_path / name / folder) for name in ("whole", "sliced")]
        for name, value in pair[0].items():
            assert torch.equal(value, pair[1][name]), name
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "sliced")]
    told = [[entry["eval_accuracy"] for entry in log["log_history"] if "eval_accuracy" in entry] for log in logs]
    assert told[0] == told[1]
    assert len(told[0]) == 2


def test_a_slice_that_is_killed_ends_where_a_whole_run_ends(
    digits: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "num_train_epochs": 4, "minutes": 2}
    options |= {"teacher_model_name_or_path": teacher, "save_strategy": "steps", "save_steps": 3}
    run_here("paper_cifar100", **options, output_dir=tmp_path / "whole")
    kill_after_checkpoint("paper_cifar100.py", **options, output_dir=tmp_path / "killed")
    results = run_here("paper_cifar100", **options, output_dir=tmp_path / "killed")
    assert results["resumed_from"]
    pair = [weights(tmp_path / name) for name in ("whole", "killed")]
    for name, value in pair[0].items():
        assert torch.equal(value, pair[1][name]), name


@pytest.mark.slow
def test_slices_of_two_processes_end_where_a_whole_run_ends(
    digits: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**SMALL, **digits, "num_train_epochs": 2, "per_device_train_batch_size": 32}
    options["teacher_model_name_or_path"] = teacher
    launch("paper_cifar100.py", 2, **options, output_dir=tmp_path / "whole")
    words = command("paper_cifar100.py", 2, **options, minutes=1e-9, output_dir=tmp_path / "sliced")
    first = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert first.stdout.count("Out of time at step 8 of 16") == 1, first.stdout[-2000:] + first.stderr[-4000:]
    launch("paper_cifar100.py", 2, **options, output_dir=tmp_path / "sliced")
    pair = [weights(tmp_path / name) for name in ("whole", "sliced")]
    for name, value in pair[0].items():
        assert torch.equal(value, pair[1][name]), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pair": "resnet20-resnet7"}, ("invalid choice: 'resnet20-resnet7'",)),
        ({"minutes": -1}, ("minutes is -1.0", "above 0")),
        ({"test_file": None}, ("no split to watch", "--validation_share 0.1")),
        ({"label_noise": 1.5}, ("label_noise is 1.5", "from 0 to 1")),
        ({"distillation": "kd", "dkd_beta": 2}, ("dkd_beta is 2.0",)),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: dict[str, Any], words: tuple[str, ...], digits: dict[str, Any], tmp_path: Path
) -> None:
    said = complaint("paper_cifar100.py", **{**SMALL, **digits, "output_dir": tmp_path / "out"} | options)
    assert all(word in said for word in words), said
