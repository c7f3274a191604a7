"""The figures of finished runs are drawn from a run's own models."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .launching import RECIPES, environment, recipe, run_here

PICTURES = ("curves", "correlation", "tsne", "per_class", "reliability")


def test_a_run_is_drawn_from_its_own_models(text_data: dict[str, Any], text_teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = text_data | {"teacher_model_name_or_path": text_teacher, "student_layers": "0,3", "max_steps": 4}
    results = run_here("bert_classification", **settings, output_dir=run, eval_strategy="no")
    student, teacher, labels, names = recipe("figures").look(run, samples=60)
    hits = (student.logits.argmax(1) == labels).mean()
    assert hits == pytest.approx(results["metrics"]["test"]["accuracy"])
    agreement = (student.logits.argmax(1) == teacher.logits.argmax(1)).mean()
    assert agreement == pytest.approx(results["metrics"]["test"]["teacher_agreement"])
    assert student.features.shape == teacher.features.shape == (60, 32)
    assert len(names) == student.logits.shape[1] == 4

    command = [sys.executable, RECIPES / "figures.py", "--runs", run, "--output_dir", tmp_path / "figures"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000 for name in PICTURES)


def test_a_folder_without_a_run_gets_one_line(tmp_path: Path) -> None:
    command = [sys.executable, RECIPES / "figures.py", "--runs", tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert "has no results.json: give the --output_dir of a finished run" in done.stderr
    assert "Traceback" not in done.stderr
