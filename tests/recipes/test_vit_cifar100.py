"""The image classification recipe from end to end on tiny data."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 asks for torchvision otherwise

from .image_assets import save_folder, save_parquet
from .launching import RECIPES, built, complaint, kill_after_checkpoint, launch, weights

RECIPE = "vit_cifar100.py"
VIT = {
    "student_model_type": "vit",
    "student_config_overrides": "image_size=8,patch_size=4,hidden_size=64,num_hidden_layers=2,num_attention_heads=2,"
    "intermediate_size=64,initializer_range=0.1",
}
RESNET = {
    "student_model_type": "resnet",
    "student_config_overrides": "embedding_size=16,hidden_sizes=[32,32,64,64],depths=[1,1,1,1],layer_type=basic",
}
SETTINGS = {"validation_share": 0.25, "horizontal_flip": False, "per_device_train_batch_size": 30}
TRAINING = SETTINGS | {"rand_augment_layers": 1, "eval_strategy": "no", "save_strategy": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {f"{split}_file": path for split, path in save_parquet(tmp_path_factory.mktemp("parquet")).items()}


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet that reads 16×16 pixels with a normalisation of its own, fine-tuned on the folder."""
    output = tmp_path_factory.mktemp("teacher")
    config = output / "options.yaml"
    config.write_text("image_size: 16\nimage_mean: [0.3, 0.3, 0.3]\nimage_std: [0.4, 0.4, 0.4]\nlearning_rate: 5e-3")
    launch(RECIPE, **TRAINING, **RESNET, config=config, dataset_name=folder, output_dir=output, num_train_epochs=8)
    return output


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    predictions = load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
    return json.loads((folder / "results.json").read_text()), predictions.with_format("numpy")[:]


def test_it_fine_tunes_a_teacher_that_plain_transformers_loads(folder: Path, teacher: Path) -> None:
    results, predictions = read(teacher)
    metrics = results["metrics"]["test"]
    assert metrics["accuracy"] == np.mean(predictions["label"] == predictions["prediction"])
    assert metrics["accuracy"] > 0.85
    best = np.argsort(-predictions["logits"], axis=1)[:, :5]
    assert metrics["top_5_accuracy"] == np.mean((best == predictions["label"][:, None]).any(axis=1))

    model = AutoModelForImageClassification.from_pretrained(teacher)
    processor = AutoImageProcessor.from_pretrained(teacher)
    assert model.config.id2label == {number: str(number) for number in range(10)}
    images = [Image.open(path).convert("RGB") for path in sorted((folder / "test").rglob("*.png"))]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    np.testing.assert_allclose(logits.numpy(), predictions["logits"], atol=1e-4)


def test_a_student_of_another_size_and_normalisation_is_distilled(
    parquet: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    settings = TRAINING | VIT | {"learning_rate": 3e-3, "num_train_epochs": 16, "dkd_beta": 2.0}
    results = launch(RECIPE, **parquet, **settings, teacher_model_name_or_path=teacher, output_dir=tmp_path)
    metrics = results["metrics"]["test"]
    assert metrics["teacher_accuracy"] == read(teacher)[0]["metrics"]["test"]["accuracy"], "not the teacher's own input"
    assert metrics["teacher_agreement"] > 0.7
    assert {"teacher_kl", "tckd", "nckd", "expected_calibration_error"} <= set(results["metrics"]["validation"])
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 8, "width": 8}
    card = (tmp_path / "README.md").read_text()
    assert f"| teacher | `{teacher}` |" in card
    assert "| β | 2 |" in card


def test_two_processes_train_as_one(parquet: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    # 60 images in batches of 30 make 2 steps an epoch: the views of the second epoch count too.
    settings = TRAINING | VIT | {"max_train_samples": 60, "max_steps": 4, "optim": "sgd", "learning_rate": 0.05}
    settings |= parquet | {"teacher_model_name_or_path": teacher, "dataloader_num_workers": 1}
    one = launch(RECIPE, **settings, output_dir=tmp_path / "one")
    two = launch(RECIPE, 2, **settings | {"per_device_train_batch_size": 15}, output_dir=tmp_path / "two")
    assert two["metrics"]["test"]["teacher_accuracy"] == one["metrics"]["test"]["teacher_accuracy"]
    alone, together = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-4)
    for results, folder in ((one, "one"), (two, "two")):
        _, predictions = read(tmp_path / folder)
        assert len(predictions["label"]) == 120
        assert results["metrics"]["test"]["accuracy"] == np.mean(predictions["label"] == predictions["prediction"])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(parquet: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    # Of 12 steps an epoch, a checkpoint every 5: it stops within an epoch and goes on into the next.
    settings = SETTINGS | VIT | parquet | {"teacher_model_name_or_path": teacher, "max_steps": 60}
    settings |= {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 5}
    launch(RECIPE, **settings, output_dir=tmp_path / "whole")
    kill_after_checkpoint(RECIPE, **settings, output_dir=tmp_path / "killed")
    results = launch(RECIPE, **settings, output_dir=tmp_path / "killed", resume_from_checkpoint="last")
    assert results["resumed_from"] is not None
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_without_a_hub_one_line_names_the_local_option() -> None:
    wrong = complaint(RECIPE)
    assert "cannot load the data set 'uoft-cs/cifar100'" in wrong
    assert "--dataset_name FOLDER" in wrong


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return importlib.import_module("vit_cifar100")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, ("cannot load the student 'WinKawaks/vit-tiny-patch16-224'", "--student_model_name_or_path FOLDER")),
        (VIT | {"teacher_model_name_or_path": "none"}, ("cannot load the teacher 'none'", "--teacher_model_name_or")),
        (VIT | {"dataset_name": "none", "train_file": "none.parquet"}, ("cannot load the data set", "--train_file")),
        (VIT | {"image_column_name": "picture"}, ("no column 'picture'; its columns are img, fine_label",)),
        (VIT | {"image_column_name": "fine_label"}, ("the column 'fine_label' holds no images",)),
        (VIT | {"label_column_name": "class"}, ("no column 'class'; its columns are", "--label_column_name")),
        (VIT | {"rand_augment_magnitude": 31}, ("rand_augment_magnitude is 31; expected 0 to 30",)),
        (VIT | {"horizontal_flips": True}, ("unrecognized arguments: --horizontal_flips",)),
    ],
)
def test_wrong_options_get_one_line(
    recipe: Any, parquet: dict[str, Any], options: dict[str, Any], messages: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = parquet | {"output_dir": tmp_path, "report_to": "none", "use_cpu": True} | options
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", [RECIPE, *words])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    lines = [line for line in (str(stop.value) + capsys.readouterr().err).splitlines() if f"{RECIPE}: error:" in line]
    assert len(lines) == 1
    assert all(message in lines[0] for message in messages), lines[0]


def test_every_epoch_has_its_own_views(recipe: Any, parquet: dict[str, Any], tmp_path: Path) -> None:
    data = recipe.ImageArguments(
        train_file=str(parquet["train_file"]), max_train_samples=30, rand_augment_layers=0, horizontal_flip=False
    )
    args = recipe.ImageTrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=10, eval_strategy="no", save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer, splits = recipe.build(data, recipe.common.StudentArguments(**VIT), args)
    seen: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(
        lambda model, inputs, named: seen.append(named["pixel_values"]), with_kwargs=True
    )
    trainer.train()
    epochs = [{image.numpy().tobytes() for batch in seen[at : at + 3] for image in batch} for at in (0, 3, 6)]
    assert [len(views) for views in epochs] == [30, 30, 30]
    assert len(epochs[1] - epochs[0]) > 20, "by 1 of 9 chances a view comes again"
    assert len(epochs[2] - epochs[1]) > 20
    trainer.evaluate()
    plain = trainer.data_collator([splits["validation"][row] for row in range(len(seen[9]))])["pixel_values"]
    torch.testing.assert_close(seen[9], plain)


def test_mixed_images_are_the_same_for_teacher_and_student(
    parquet: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    options = TRAINING | VIT | parquet | {"output_dir": tmp_path, "teacher_model_name_or_path": teacher}
    trainer, _ = built("vit_cifar100", **options | {"rand_augment_layers": 0, "mixup_alpha": 0.8, "max_steps": 1})
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == (30, 10)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(30))
    assert ((batch["labels"] > 0).sum(1) == 2).any()
    # The teacher's pixels are the student's at twice the size and in another normalisation.
    shown = 0.5 * batch["pixel_values"] + 0.5
    taught = torch.nn.functional.avg_pool2d(0.4 * batch["teacher_pixel_values"] + 0.3, 2)
    assert torch.corrcoef(torch.stack((shown.flatten(), taught.flatten())))[0, 1] > 0.97
    assert not next(iter(trainer.get_eval_dataloader()))["labels"].is_floating_point()
    trainer.train()
    assert trainer.state.log_history[0]["dkd"] > 0
