"""The figures of finished runs: what they show, and that they are drawn from a run's own models."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_dkd import decoupled_kl
from hf_dkd.metrics import ExpectedCalibrationError

from .launching import RECIPES, environment, recipe, run_here

PICTURES = ("curves", "correlation", "tsne", "per_class", "reliability")


def looks() -> tuple[dict[str, Any], Any, np.ndarray]:
    """A student and a teacher of 60 examples and 6 classes, and the labels."""
    figures, source = recipe("figures"), np.random.default_rng(0)
    student, teacher = (figures.Look(source.normal(size=(60, 6)), source.normal(size=(60, 8))) for _ in range(2))
    return {"student": student, "copy": teacher}, teacher, np.arange(60) % 6


def test_correlations_of_a_copy_are_the_teachers() -> None:
    students, teacher, _ = looks()
    panels = recipe("figures").correlation(students, teacher).axes[:2]
    centred = [one.logits - one.logits.mean(1, keepdims=True) for one in (students["student"], teacher)]
    gap = np.abs(np.corrcoef(centred[0].T) - np.corrcoef(centred[1].T))
    np.testing.assert_allclose(panels[0].images[0].get_array(), gap)
    assert [panel.get_title() for panel in panels] == [f"student: mean {gap.mean():.3f}", "copy: mean 0.000"]
    # What moves all logits of an example alike is seen by no softmax.
    moved = {"moved": teacher._replace(logits=teacher.logits + 5 * np.arange(60)[:, None])}
    assert recipe("figures").correlation(moved, teacher).axes[0].get_title() == "moved: mean 0.000"


def test_terms_by_class_are_means_of_its_rows() -> None:
    students, teacher, labels = looks()
    panels = recipe("figures").per_class(students, teacher, labels, temperature=2.0).axes
    terms = decoupled_kl(
        torch.tensor(students["student"].logits), torch.tensor(teacher.logits), torch.tensor(labels), temperature=2.0
    )
    for panel, term in zip(panels, terms, strict=True):
        means = [term[labels == label].mean().item() for label in range(6)]
        np.testing.assert_allclose(panel.lines[0].get_ydata(), sorted(means, reverse=True))
        np.testing.assert_allclose(panel.lines[1].get_ydata(), 0, atol=1e-12)


def test_reliability_tells_the_calibration_error() -> None:
    students, teacher, labels = looks()
    panels = recipe("figures").reliability_diagram(students, teacher, labels).axes
    metric = ExpectedCalibrationError()
    error = metric.compute(predictions=teacher.logits, references=labels)["expected_calibration_error"]
    assert panels[0].get_title() == f"teacher: error {error:.3f}"


def test_t_sne_shows_the_classes_asked_for() -> None:
    students, teacher, labels = looks()
    figure = recipe("figures").tsne(students, teacher, labels, [f"class {i}" for i in range(6)], classes=4)
    assert len(figure.axes) == 3
    assert all(sum(len(c.get_offsets()) for c in axes.collections) == 40 for axes in figure.axes)


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
