"""The table of what runs of the paper's benchmark reached."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from .launching import recipe

ACCURACIES = {  # of the teacher, and of the student on labels alone, with KD and with DKD
    "resnet56-resnet20": (72.34, 69.06, 70.66, 71.97),
    "resnet110-resnet32": (74.31, 71.14, 73.08, 74.11),
    "resnet32x4-resnet8x4": (79.42, 72.50, 73.33, 76.32),
    "wrn_40_2-wrn_16_2": (75.61, 73.26, 74.92, 76.24),
    "wrn_40_2-wrn_40_1": (75.61, 71.98, 73.54, 74.81),
    "vgg13-vgg8": (74.64, 70.36, 72.98, 74.68),
    "resnet32x4-shufflenet_v1": (79.42, 70.50, 74.07, 76.45),
    "wrn_40_2-shufflenet_v1": (75.61, 70.50, 74.83, 76.70),
    "vgg13-mobilenet_v2": (74.64, 64.60, 67.37, 69.71),
    "resnet50-mobilenet_v2": (79.34, 64.60, 67.35, 70.35),
    "resnet32x4-shufflenet_v2": (79.42, 71.82, 74.45, 77.07),
    "resnet34-resnet18": (73.31, 69.75, 70.66, 71.70),
    "resnet50-mobilenet_v1": (76.16, 68.87, 68.58, 72.05),
}


def test_figures_are_those_of_the_paper() -> None:
    pairs = recipe("paper_presets").PAIRS
    methods = ("teacher", "cross-entropy", "kd", "dkd")
    told = {name: dict(pair.accuracy) for name, pair in pairs.items()}
    wanted = {name: dict(zip(methods, figures, strict=True)) for name, figures in ACCURACIES.items()}
    assert told == wanted | {"resnet20-resnet8": {}}


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, "dkd"),
        ({"dkd_beta": 8.0, "num_train_epochs": 60.0, "bf16": True, "logging_steps": 10, "seed": 3}, "dkd"),
        ({"distillation": "kd", "dkd_alpha": 0.9}, "kd"),
        ({"dkd_alpha": 0.0, "dkd_beta": 0.0, "teacher_epochs": 3.0}, "cross-entropy"),
        ({"torch_compile_mode": "max-autotune", "full_determinism": True, "ddp_backend": "nccl"}, "dkd"),
        ({"dkd_beta": 6.0}, None),
        ({"dkd_alpha": 0.0, "dkd_beta": 0.0, "label_noise": 0.1}, None),
        ({"per_device_train_batch_size": 256}, None),
        ({"dkd_standardize": True}, None),
        ({"student_model_name_or_path": "somewhere"}, None),
        ({"other_teacher": True}, None),
        ({"num_train_epochs": 60.0, "dkd_warmup_epochs": 5.0}, "dkd"),
        ({"num_train_epochs": 60.0, "dkd_warmup_epochs": 20.0}, None),
        ({"distillation": "kd", "kd_warmup": True}, None),
        (
            {"dataloader_num_workers": 4, "report_to": ["none"], "save_steps": 5, "hub_model_id": "x", "minutes": 2},
            "dkd",
        ),
        ({"dataloader_drop_last": True}, None),
    ],
)
def test_the_table_knows_which_runs_repeat_the_paper(settings: dict[str, Any], method: str | None) -> None:
    assert recipe("paper_table").method_of(settings) == method


def write_run(folder: Path, accuracies: list[float], **settings: Any) -> None:
    folder.mkdir(parents=True)
    history = [{"eval_accuracy": value, "epoch": float(epoch)} for epoch, value in enumerate(accuracies, start=1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "epoch": len(history)}))
    results = {"recipe": "paper_cifar100.py", "settings": settings, "training_seconds": 10.0, "resumed_from": None}
    (folder / "results.json").write_text(json.dumps(results))


def test_the_table_has_last_and_best_epochs_with_intervals(tmp_path: Path) -> None:
    settings = {"pair": "resnet32x4-resnet8x4", "teacher_model_name_or_path": str(tmp_path / "teacher")}
    write_run(tmp_path / "teacher", [0.5, 0.79, 0.78])
    (tmp_path / "teacher/results.json").unlink()
    runs = [[0.1, 0.76, 0.75], [0.2, 0.77, 0.77], [0.3, 0.752, 0.74]]
    for seed, accuracies in enumerate(runs):
        write_run(tmp_path / f"runs/dkd/seed-{seed}", accuracies, **settings)
    write_run(tmp_path / "runs/kd", [0.7, 0.73], **settings, distillation="kd", num_train_epochs=2.0)
    write_run(tmp_path / "runs/cross-entropy", [0.7, 0.72], **settings, dkd_alpha=0.0, dkd_beta=0.0)
    write_run(tmp_path / "runs/dkd:dkd_alpha=0", [0.7, 0.71], **settings, dkd_alpha=0.0)
    table = recipe("paper_table")
    found = table.find([str(tmp_path / "runs")])
    assert {method: runs[0].method for (_, method, _), runs in found.items()} == {
        "dkd": "dkd", "kd": "kd", "cross-entropy": "cross-entropy", "dkd:dkd_alpha=0": None,
        "teacher teacher": "teacher",
    }  # fmt: skip
    of_dkd = found["resnet32x4-resnet8x4", "dkd", str(tmp_path / "runs/dkd")]
    assert table.find([str(tmp_path / "runs"), str(tmp_path / "runs/dkd")]) == found  # no run counts twice
    assert [run.last for run in of_dkd] == pytest.approx([75, 77, 74])
    assert [run.best for run in of_dkd] == pytest.approx([76, 77, 75.2])
    last = table.interval([75.0, 77.0, 74.0])
    half = stats.t.ppf(0.975, 2) * np.std([75, 77, 74], ddof=1) / np.sqrt(3)
    assert (last["mean"], last["low"], last["high"]) == pytest.approx((226 / 3, 226 / 3 - half, 226 / 3 + half))
    with pytest.MonkeyPatch.context() as patch:
        words = ["paper_table.py", "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
        patch.setattr("sys.argv", words)
        table.main()
    written = {row["method"]: row for row in json.loads((tmp_path / "out/table.json").read_text())}
    assert (written["dkd"]["paper"], written["dkd"]["reruns"], written["dkd"]["runs"]) == (76.32, "75.4–76.3", 3)
    assert (written["kd"]["paper"], written["cross-entropy"]["paper"]) == (73.33, 72.5)
    assert written["teacher teacher"]["paper"] == 79.42
    assert written["dkd:dkd_alpha=0"]["paper"] is None
    line = next(line for line in (tmp_path / "out/table.md").read_text().splitlines() if "| dkd |" in line)
    assert f"75.33 [{226 / 3 - half:.2f}, {226 / 3 + half:.2f}]" in line


def test_equal_values_have_an_interval_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    assert recipe("paper_table").interval([70.0, 70.0, 70.0]) == {"mean": 70, "low": 70, "high": 70}
    assert not recwarn.list


def test_a_teacher_that_was_not_evaluated_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "teacher", [])
    (tmp_path / "teacher/results.json").unlink()
    for name, teacher in (("dkd", {"teacher_model_name_or_path": str(tmp_path / "teacher")}), ("alone", {})):
        write_run(tmp_path / "runs" / name, [0.7, 0.75], pair="resnet32x4-resnet8x4", **teacher)
    assert {method for _, method, _ in recipe("paper_table").find([str(tmp_path / "runs")])} == {"dkd", "alone"}


def test_figures_of_the_paper_do_not_stand_beside_another_teacher(tmp_path: Path) -> None:
    settings = {"pair": "resnet32x4-resnet8x4", "teacher_model_name_or_path": str(tmp_path / "teacher")}
    write_run(tmp_path / "teacher", [0.5, 0.79])
    (tmp_path / "teacher/results.json").unlink()
    write_run(tmp_path / "runs/dkd", [0.7, 0.75], **settings, other_teacher=True)
    found = recipe("paper_table").find([str(tmp_path / "runs")])
    assert {method: runs[0].method for (_, method, _), runs in found.items()} == {"dkd": None, "teacher teacher": None}


def test_seconds_are_those_of_runs_that_trained_at_a_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run knows those of its last slice alone."""
    settings = {"pair": "resnet32x4-resnet8x4", "teacher_model_name_or_path": str(tmp_path / "teacher")}
    for folder, seconds, start in (
        ("dkd/seed-0", 10, None), ("dkd/seed-1", 14, None), ("dkd/seed-2", 3, "checkpoint-8"), ("kd", 5, "checkpoint-8")
    ):  # fmt: skip
        distillation = {"distillation": "kd"} if folder == "kd" else {}
        write_run(tmp_path / "runs" / folder, [0.7, 0.75], **settings, **distillation)
        file = tmp_path / "runs" / folder / "results.json"
        results = json.loads(file.read_text()) | {"training_seconds": seconds, "resumed_from": start}
        file.write_text(json.dumps(results))
    words = ["paper_table.py", "--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    recipe("paper_table").main()
    written = {row["method"]: row for row in json.loads((tmp_path / "out/table.json").read_text())}
    assert {method: (row["runs"], row["seconds"]) for method, row in written.items()} == {
        "dkd": (3, 12), "kd": (1, None),
    }  # fmt: skip
    ends = [line.rsplit("|", 2)[1].strip() for line in (tmp_path / "out/table.md").read_text().splitlines()]
    assert ends == ["seconds", "---", "12", ""]
