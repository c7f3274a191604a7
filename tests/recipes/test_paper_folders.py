"""Folders of the paper's benchmark: kept for one training, which goes on there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from .image_assets import save_parquet
from .launching import recipe, run_here, weights

SMALL = {"pair": "resnet20-resnet8", "image_size": 16, "max_train_samples": 256, "num_train_epochs": 2}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run on 256 and 120 images of digits, on labels alone: two epochs of four steps."""
    files = save_parquet(tmp_path_factory.mktemp("digits"))
    return {f"{split}_file": str(path) for split, path in files.items()} | SMALL | {"dkd_alpha": 0, "dkd_beta": 0}


@pytest.fixture(scope="module")
def begun(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was stopped in its first epoch."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    with pytest.raises(SystemExit):
        run_here("paper_cifar100", **options, output_dir=folder, minutes=1e-9)
    return folder


def copy(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "out"))


def step_of(folder: Path) -> int:
    (checkpoint,) = folder.glob("checkpoint-*")
    return int(checkpoint.name.removeprefix("checkpoint-"))


def test_a_slice_ends_by_the_clock(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seconds are less than these epochs take, and more than one step does."""
    given = options | {"num_train_epochs": 2000, "output_dir": tmp_path / "out", "save_strategy": "no"}
    with pytest.raises(SystemExit) as stopped:
        run_here("paper_cifar100", **given, minutes=2 / 60)
    assert stopped.value.code == 0
    step = step_of(tmp_path / "out")
    assert 0 < step < 8000
    assert f"Out of time at step {step} of 8000: the same command goes on from there." in capsys.readouterr().out
    assert json.loads((tmp_path / f"out/checkpoint-{step}/trainer_state.json").read_text())["global_step"] == step


def test_what_is_harmless_may_differ_when_a_training_goes_on(
    options: dict[str, Any], begun: Path, tmp_path: Path
) -> None:
    folder = copy(begun, tmp_path)
    assert step_of(folder) == 1
    changes = {"logging_steps": 3, "per_device_eval_batch_size": 60, "disable_tqdm": True, "save_total_limit": 2}
    changes |= {"dataloader_num_workers": 1, "run_name": "again", "save_strategy": "steps", "save_steps": 4}
    results = run_here("paper_cifar100", **options | changes, output_dir=folder)
    assert results["resumed_from"] == str(folder / "checkpoint-1")
    run_here("paper_cifar100", **options, output_dir=tmp_path / "whole")
    resumed = weights(folder)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, resumed[name]), name


def test_checkpoints_of_another_recipe_are_refused(options: dict[str, Any], begun: Path, tmp_path: Path) -> None:
    folder = copy(begun, tmp_path)
    (folder / "training.json").unlink()
    with pytest.raises(SystemExit, match=r"out holds a training that paper_cifar100.py did not begin: choose another"):
        run_here("paper_cifar100", **options, output_dir=folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_with_half_a_file_is_named(
    name: str, options: dict[str, Any], begun: Path, tmp_path: Path
) -> None:
    folder = copy(begun, tmp_path)
    file = folder / "checkpoint-1" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SystemExit, match=rf"{name} is not whole: remove .*out/checkpoint-1; the training goes on"):
        run_here("paper_cifar100", **options, output_dir=folder)
    shutil.rmtree(folder / "checkpoint-1")
    assert run_here("paper_cifar100", **options, output_dir=folder)["resumed_from"] is None


def test_a_checkpoint_to_resume_from_is_one(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"missing has no trainer_state.json: name a folder checkpoint-N, or 'last'"):
        run_here("paper_cifar100", **options, output_dir=tmp_path / "o", resume_from_checkpoint=tmp_path / "missing")


def test_a_finished_run_keeps_its_results(
    options: dict[str, Any], begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(begun, tmp_path)
    run_here("paper_cifar100", **options, output_dir=folder)
    accuracy = capsys.readouterr().out.splitlines()[-1]
    assert accuracy.startswith("Accuracy: last epoch ")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    run_here("paper_cifar100", **options, output_dir=folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == [f"The training in {folder} is done: its results stay as they are.", accuracy]
    (folder / "results.json").unlink()  # a run that was stopped while it wrote them
    assert run_here("paper_cifar100", **options, output_dir=folder)["metrics"]["test"]


def test_a_training_of_half_an_epoch_does_not_go_on_beyond_its_end(options: dict[str, Any], tmp_path: Path) -> None:
    given = options | {"num_train_epochs": 0.5, "output_dir": tmp_path / "out"}
    results = run_here("paper_cifar100", **given)
    before = weights(tmp_path / "out")
    (tmp_path / "out/results.json").unlink()  # as one that was stopped while it was evaluated
    again = run_here("paper_cifar100", **given)
    assert again["metrics"]["test"]["accuracy"] == results["metrics"]["test"]["accuracy"]
    assert step_of(tmp_path / "out") == 2
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, before[name]), name


def test_a_training_whose_epochs_are_over_before_its_last_step_takes_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Of three quarters of an epoch of four batches, three make the first step."""
    given = options | {"num_train_epochs": 0.75, "gradient_accumulation_steps": 3, "output_dir": tmp_path / "out"}
    given |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    run_here("paper_cifar100", **given)
    before = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    for name in ("results.json", "trainer_state.json"):
        (tmp_path / "out" / name).unlink()
    run_here("paper_cifar100", **given)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 2
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["processes", "mixed_precision"])
def test_a_training_goes_on_as_it_began(name: str, options: dict[str, Any], begun: Path, tmp_path: Path) -> None:
    folder = copy(begun, tmp_path)
    file = folder / "training.json"
    settings = json.loads(file.read_text())
    assert settings[name] == {"processes": 1, "mixed_precision": "no"}[name]
    there = {"processes": 2, "mixed_precision": "bf16"}[name]
    file.write_text(json.dumps(settings | {name: there}))
    with pytest.raises(SystemExit, match=f"out holds a training with {name} {there} and not {settings[name]}: start"):
        run_here("paper_cifar100", **options, output_dir=folder)
    file.write_text(json.dumps(settings))
    run_here("paper_cifar100", **options, output_dir=folder)
    file.write_text(json.dumps(settings | {name: there}))
    run_here("paper_cifar100", **options, output_dir=folder)  # it is finished, however it ran


def test_a_longer_training_goes_on_from_the_end_of_a_shorter_one(
    options: dict[str, Any], begun: Path, tmp_path: Path
) -> None:
    run_here("paper_cifar100", **options | {"num_train_epochs": 1}, output_dir=tmp_path / "one")
    given = options | {"resume_from_checkpoint": tmp_path / "one/checkpoint-4", "output_dir": tmp_path / "out"}
    run_here("paper_cifar100", **given)
    assert step_of(tmp_path / "out") == 8


def test_the_last_epoch_is_evaluated_after_a_kill_before_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    given = options | {"save_strategy": "steps", "save_steps": 4, "output_dir": tmp_path / "out"}
    results = run_here("paper_cifar100", **given)
    for name in ("results.json", "trainer_state.json"):
        (tmp_path / "out" / name).unlink()
    again = run_here("paper_cifar100", **given)
    assert again["metrics"]["test"]["accuracy"] == results["metrics"]["test"]["accuracy"]
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    epochs = {entry["epoch"]: entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry}
    assert epochs[2] == again["metrics"]["test"]["accuracy"]


def test_another_training_is_refused_while_one_runs(options: dict[str, Any], begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(begun / "training.json", folder)  # as one that trains its teacher first
    with FileLock(folder / "_training.lock"), pytest.raises(SystemExit, match="a training with seed None and not 3"):
        run_here("paper_cifar100", **options, output_dir=folder, seed=3, minutes=1 / 60)


def test_several_gpus_in_one_process_are_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe("paper_options").PaperTrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit, match=r"one process sees 2 GPUs.*accelerate launch --num_processes 2"):
        run_here("paper_cifar100", **options, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_tells_whether_a_training_is_finished(tmp_path: Path) -> None:
    finished = recipe("paper_folders").finished
    assert not finished(str(tmp_path))
    for text, done in (("", False), ('{"global_step": 8', False), ('{"global_step": 3, "max_steps": 8}', False),
                       ('{"global_step": 8, "max_steps": 8}', True)):  # fmt: skip
        (tmp_path / "trainer_state.json").write_text(text)
        assert finished(str(tmp_path)) is done
