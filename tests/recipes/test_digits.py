"""The demo, shortened: what it prints, writes and holds equal."""

import json
import subprocess
from pathlib import Path

import pytest
from transformers import ViTForImageClassification

from .launching import command, environment

METHODS = ("cross-entropy", "classical KD", "DKD")


def test_the_demo_compares_the_methods_from_equal_starts(tmp_path: Path) -> None:
    short = {"seeds": 2, "num_train_epochs": 1, "teacher_epochs": 1, "output_dir": tmp_path}
    done = subprocess.run(command("digits.py", **short), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["table"]) == ["teacher", *METHODS]
    assert {results["table"][name]["parameters"] for name in METHODS} == {5018}
    for name in METHODS:
        accuracies = [100 * run["eval_accuracy"] for run in results["runs"][name]]
        mean, spread = sum(accuracies) / 2, abs(accuracies[0] - accuracies[1]) / 2**0.5
        row = results["table"][name]
        assert (row["accuracy"], row["accuracy_spread"]) == (pytest.approx(mean), pytest.approx(spread))
        assert f"{name:<14} {f'{mean:.2f} ± {spread:.2f}':>16}" in done.stdout
    assert "differences of a few tenths are noise" in done.stdout

    # The first step sees the same examples through the same weights: its hard-label loss tells.
    for seed in range(2):
        first = {results["histories"][name][seed][0]["ce"] for name in METHODS}
        assert len(first) == 1
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "## Distillation" in (tmp_path / "README.md").read_text()
    assert ViTForImageClassification.from_pretrained(tmp_path).num_parameters() == 5018


def test_the_example_of_other_targets_trains_each_case(tmp_path: Path) -> None:
    short = {"seeds": 2, "num_train_epochs": 1, "teacher_epochs": 1, "output_dir": tmp_path}
    done = subprocess.run(
        command("targets.py", **short), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 13
    assert all(0 <= run["eval_accuracy"] <= 1 for results in runs.values() for run in results)
    means = {name: sum(run["eval_accuracy"] for run in results) / 2 for name, results in runs.items()}
    for name, mean in means.items():
        assert f"{name}  " in done.stdout
        assert f"{100 * mean:.2f} ±" in done.stdout
    # No two cases are the same training.
    assert len({tuple(run["eval_loss"] for run in results) for results in runs.values()}) == 13
