"""The teacher of the paper's benchmark: trained as published, by one run of several, and no other than the pair's."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForImageClassification, HfArgumentParser

from .image_assets import save_parquet
from .launching import built, command, environment, launch, recipe, run_here, weights

SMALL = {"pair": "resnet20-resnet8", "image_size": 16, "max_train_samples": 128, "num_train_epochs": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for the data: 480 and 120 images of digits."""
    files = save_parquet(tmp_path_factory.mktemp("digits"))
    return {f"{split}_file": str(path) for split, path in files.items()}


def untrained(folder: Path, name: str, classes: int = 10) -> str:
    """A model from elsewhere, with random weights."""
    labels = {"num_labels": classes, "id2label": {number: str(number) for number in range(classes)}}
    config = recipe("cifar_models").config_of(name, **labels)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return str(folder)


# ---- How it is trained ----


def test_a_teacher_is_trained_as_published_whatever_the_student_is(digits: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "weight_decay": 0.3, "learning_rate": 0.4, "per_device_train_batch_size": 16, "label_smoothing_factor": 0.5,
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "distillation": "kd", "push_to_hub": False,
        "logging_steps": 7, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    options = SMALL | digits | {"output_dir": str(tmp_path / "out"), "use_cpu": True} | changes
    data, args = HfArgumentParser(recipe("paper_cifar100").ARGUMENTS).parse_dict(options)
    own = recipe("paper_teacher").teacher_arguments("somewhere", args)
    assert (own.weight_decay, own.learning_rate, own.per_device_train_batch_size) == (5e-4, 0.05, 64)
    assert (own.label_smoothing_factor, own.gradient_accumulation_steps, own.max_grad_norm) == (0, 1, 0)
    assert (own.distillation, own.ce_weight, own.output_dir, own.num_train_epochs) == ("dkd", 1, "somewhere", 1)
    assert (own.logging_steps, own.save_strategy, own.seed, own.use_cpu) == (7, "no", 3, True)
    settings = recipe("paper_teacher").teacher_settings(data, own)
    assert (settings["batch_size"], settings["max_steps"], settings["split_seed"]) == (64, -1, 0)
    assert (settings["teacher"], settings["teacher_epochs"]) == ("resnet20", 1)


def test_changes_to_the_student_leave_the_teacher_as_it_is(digits: dict[str, Any], tmp_path: Path) -> None:
    options = SMALL | digits | {"output_dir": tmp_path / "out"}
    for name, changes in (("plain", {}), ("other", {"weight_decay": 0.3, "per_device_train_batch_size": 16})):
        built("paper_cifar100", **options, teacher_model_name_or_path=tmp_path / name, **changes)
    other = weights(tmp_path / "other")
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, other[name]), name


def test_a_teacher_of_a_smoke_run_is_not_taken_for_a_trained_one(digits: dict[str, Any], tmp_path: Path) -> None:
    options = SMALL | digits | {"output_dir": tmp_path / "out", "teacher_model_name_or_path": tmp_path / "teacher"}
    built("paper_cifar100", **options, max_steps=1)
    with pytest.raises(SystemExit, match="teacher holds a training with max_steps 1 and not -1"):
        built("paper_cifar100", **options)
    with pytest.raises(SystemExit, match=r"with max_steps 1 and not -1, split_seed 0 and not 1: start that one"):
        built("paper_cifar100", **options, split_seed=1)


def test_a_teacher_is_complete_once_its_training_is(
    digits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    options = SMALL | digits | {"output_dir": tmp_path / "out", "teacher_model_name_or_path": teacher}
    built("paper_cifar100", **options)
    assert f"Training the teacher resnet20 in {teacher} first: it holds none." in capsys.readouterr().out
    built("paper_cifar100", **options)
    assert "Training the teacher" not in capsys.readouterr().out
    state = teacher / "trainer_state.json"
    text = state.read_text()
    for broken in (text[:100], "", text.replace('"global_step": 2', '"global_step": 1')):
        state.write_text(broken)
        built("paper_cifar100", **options)
        assert f"Training the teacher resnet20 in {teacher} first: it holds a part of one." in capsys.readouterr().out
        assert json.loads(state.read_text())["global_step"] == 2


def test_labels_alone_need_no_teacher(digits: dict[str, Any], tmp_path: Path) -> None:
    options = SMALL | digits | {"teacher_model_name_or_path": tmp_path / "teacher", "dkd_alpha": 0, "dkd_beta": 0}
    results = run_here("paper_cifar100", **options, output_dir=tmp_path / "alone")
    assert not (tmp_path / "teacher").exists()
    assert results["settings"]["teacher_model_name_or_path"] == str(tmp_path / "teacher")
    beside = run_here("paper_cifar100", **options, output_dir=tmp_path / "beside", eval_with_teacher=True)
    assert (tmp_path / "teacher/model.safetensors").exists()
    assert 0 <= beside["metrics"]["test"]["teacher_agreement"] <= 1
    alone = weights(tmp_path / "alone")
    for name, value in weights(tmp_path / "beside").items():
        assert torch.equal(value, alone[name]), name


# ---- Which one is taken ----


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "outputs/teachers/resnet32x4"),
        ({"pair": "wrn_40_2-shufflenet_v1"}, "outputs/teachers/wrn_40_2"),
        ({"image_size": 16}, "outputs/teachers/resnet32x4-16px"),
        ({"label_noise": 0.1}, "outputs/teachers/resnet32x4-noise0.1"),
        ({"auto_augment": True}, "outputs/teachers/resnet32x4-auto_augment"),
        (
            {"image_size": 16, "label_noise": 0.25, "auto_augment": True, "pair": "resnet20-resnet8"},
            "outputs/teachers/resnet20-16px-noise0.25-auto_augment",
        ),
        ({"image_size": 16, "label_noise": 0.1, "teacher_model_name_or_path": "mine"}, "mine"),
        ({"pair": "resnet34-resnet18"}, "microsoft/resnet-34"),
        ({"pair": "resnet50-mobilenet_v1", "label_noise": 0.1}, "microsoft/resnet-50"),
        ({"pair": "resnet50-mobilenet_v1", "teacher_model_name_or_path": "mine"}, "mine"),
    ],
)
def test_a_teacher_has_a_folder_for_each_kind_of_images(options: dict[str, Any], path: str) -> None:
    parser = HfArgumentParser(recipe("paper_cifar100").ARGUMENTS)
    assert recipe("paper_teacher").teacher_path(*parser.parse_dict(options | {"use_cpu": True})) == path


def test_another_architecture_is_refused_unless_it_is_asked_for(digits: dict[str, Any], tmp_path: Path) -> None:
    options = SMALL | digits | {"output_dir": tmp_path / "out"}
    for name, words in (
        ("resnet14", r"is no resnet20, with depths \[2, 2, 2\] and not .3, 3, 3.: give one with --teacher FOLDER"),
        ("wrn_16_2", r"model_type cifar_wide_resnet and not cifar_resnet.*or say --other_teacher true"),
    ):
        options["teacher_model_name_or_path"] = untrained(tmp_path / name, name)
        with pytest.raises(SystemExit, match=words):
            built("paper_cifar100", **options)
        trainer, _ = built("paper_cifar100", **options, other_teacher=True)
        assert trainer.teacher.model.config.model_type.startswith("cifar_")
    for pair in recipe("paper_presets").PAIRS:
        if not pair.startswith("resnet20-") and not pair.startswith(("resnet34-", "resnet50-mobilenet_v1")):
            options["teacher_model_name_or_path"] = tmp_path / "resnet14"
            with pytest.raises(SystemExit, match=f"is no {pair.split('-')[0]}, with "):
                built("paper_cifar100", **options | {"pair": pair})


def test_a_teacher_of_other_classes_is_refused(digits: dict[str, Any], tmp_path: Path) -> None:
    teacher = untrained(tmp_path / "teacher", "resnet20", classes=7)
    with pytest.raises(SystemExit, match=r"teacher has 7 classes and the data 10: give one that was trained on this"):
        built("paper_cifar100", **SMALL, **digits, teacher_model_name_or_path=teacher, output_dir=tmp_path / "out")


def test_a_student_of_other_classes_is_refused(digits: dict[str, Any], tmp_path: Path) -> None:
    student = untrained(tmp_path / "student", "resnet8", classes=7)
    with pytest.raises(SystemExit, match=r"the student .*student has 7 classes and the data 10: give one that was"):
        built("paper_cifar100", **SMALL, **digits, student_model_name_or_path=student, dkd_alpha=0.0, dkd_beta=0.0)


def test_classes_of_a_teacher_are_told_by_their_names(digits: dict[str, Any], tmp_path: Path) -> None:
    teacher = untrained(tmp_path / "teacher", "resnet20")
    config = AutoConfig.from_pretrained(teacher)
    config.id2label = {number: str(9 - number) for number in range(10)}
    config.label2id = {str(9 - number): number for number in range(10)}
    config.save_pretrained(teacher)
    trainer, _ = built("paper_cifar100", **SMALL, **digits, teacher_model_name_or_path=teacher, output_dir=tmp_path)
    assert trainer.teacher.class_names == [str(9 - number) for number in range(10)]
    options = SMALL | digits | {"output_dir": tmp_path}
    with pytest.raises(SystemExit, match=r"the student .* names other classes than the data, such as '9' for '0'"):
        built("paper_cifar100", **options, student_model_name_or_path=teacher, dkd_alpha=0.0, dkd_beta=0.0)
    config.id2label[3] = "six"
    config.save_pretrained(teacher)
    with pytest.raises(SystemExit, match=r"the teacher .* names other classes than the data, such as '9' for '0': if"):
        built("paper_cifar100", **options, teacher_model_name_or_path=teacher)
    config.id2label = {number: f"LABEL_{number}" for number in range(10)}
    config.label2id = {f"LABEL_{number}": number for number in range(10)}
    config.save_pretrained(teacher)
    built("paper_cifar100", **options, teacher_model_name_or_path=teacher)


def test_a_folder_without_weights_is_told_as_what_it_is(digits: dict[str, Any], tmp_path: Path) -> None:
    teacher = untrained(tmp_path / "teacher", "resnet20")
    (tmp_path / "teacher/model.safetensors").unlink()
    with pytest.raises(SystemExit, match="cannot load the teacher") as stopped:
        built("paper_cifar100", **SMALL, **digits, teacher_model_name_or_path=teacher, output_dir=tmp_path / "out")
    assert "no such local path" not in str(stopped.value)
    assert "model.safetensors" in str(stopped.value)


def test_the_students_folder_is_not_the_teachers(digits: dict[str, Any], tmp_path: Path) -> None:
    options = SMALL | digits | {"output_dir": tmp_path / "one", "teacher_model_name_or_path": tmp_path / "x/../one"}
    with pytest.raises(SystemExit, match="one is for the student, and the teacher's too: choose another folder"):
        run_here("paper_cifar100", **options)
    assert not (tmp_path / "one").exists()


# ---- Several runs at once ----


def start(processes: int, folder: Path, log: str = "log", **options: Any) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    words = command("paper_cifar100.py", processes, **options, output_dir=folder / "out")
    return subprocess.Popen(
        words, env=environment(), stdout=(folder / log).open("w"), stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_waits_for_the_teacher_of_another(
    processes: int, digits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    options = SMALL | digits | {"teacher_model_name_or_path": teacher}
    teacher.mkdir()
    lock, log = FileLock(teacher / "_training.lock"), tmp_path / "two/log"
    lock.acquire()  # as a run does while it trains there
    second = start(processes, tmp_path / "two", **options)
    try:
        while f"Waiting for another run, which trains in {teacher}." not in log.read_text():
            assert second.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        time.sleep(3)
        assert not (teacher / "training.json").exists()
        lock.release()
        run_here("paper_cifar100", **options, output_dir=tmp_path / "one")
        assert second.wait(timeout=300) == 0, log.read_text()[-3000:]
    finally:
        if second.poll() is None:
            os.killpg(second.pid, signal.SIGKILL)
    assert log.read_text().count("Waiting for another run") == 1
    assert (log.read_text() + capsys.readouterr().out).count("Training the teacher") == 1
    assert json.loads((tmp_path / "two/out/results.json").read_text())["processes"] == processes
    state = json.loads((teacher / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 2


def test_the_lock_goes_with_a_killed_run(digits: dict[str, Any], tmp_path: Path) -> None:
    options = SMALL | digits | {"teacher_model_name_or_path": tmp_path / "teacher", "teacher_epochs": 15}
    options["save_strategy"] = "epoch"
    first = start(1, tmp_path / "one", **options)
    while not any((tmp_path / "teacher").glob("checkpoint-*/trainer_state.json")):
        assert first.poll() is None, (tmp_path / "one/log").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    results = launch("paper_cifar100.py", **options, output_dir=tmp_path / "two")
    assert results["metrics"]["test"]
    assert json.loads((tmp_path / "teacher/trainer_state.json").read_text())["epoch"] == 15


def test_two_runs_in_one_folder_take_turns(digits: dict[str, Any], tmp_path: Path) -> None:
    options = SMALL | digits | {"dkd_alpha": 0, "dkd_beta": 0}
    runs = [start(1, tmp_path, **options, log=name) for name in ("one", "two")]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    logs = [(tmp_path / name).read_text() for name in ("one", "two")]
    assert sorted("Wrote the model" in log for log in logs) == [False, True]
    assert sorted(f"The training in {tmp_path / 'out'} is done" in log for log in logs) == [False, True]


@pytest.mark.parametrize("folder", ["teacher", "out"])
def test_a_run_that_waits_ends_by_the_clock(
    folder: str, digits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SMALL | digits | {"teacher_model_name_or_path": tmp_path / "teacher", "output_dir": tmp_path / "out"}
    (tmp_path / folder).mkdir()
    with FileLock(tmp_path / folder / "_training.lock"), pytest.raises(SystemExit) as stopped:
        run_here("paper_cifar100", **options, minutes=1 / 60)
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert f"Out of time, as another run trains in {tmp_path / folder}: the same command goes on from there." in told
    results = run_here("paper_cifar100", **options)
    assert results["metrics"]["test"]
