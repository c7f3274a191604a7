from typing import Any

import numpy as np
import pytest
import torch

from hf_dkd import decoupled_kl
from hf_dkd.figures import class_correlations, correlation_matrix, reliability_diagram, terms_by_class, tsne
from hf_dkd.metrics import ExpectedCalibrationError

LABELS = np.arange(60) % 6
TEACHER, STUDENT, *FEATURES = (np.random.default_rng(seed).normal(size=(60, 6 + seed // 2)) for seed in range(4))
STUDENTS = {"student": STUDENT, "copy": TEACHER}


def test_correlations_are_between_classes() -> None:
    logits = np.array([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [4.0, 1.0, -5.0]])
    found = correlation_matrix(logits)
    assert found[0, 2] == pytest.approx(np.corrcoef([1, 2, 4], [-1, -2, -5])[0, 1])
    # What moves all logits of an example alike is seen by no softmax.
    np.testing.assert_allclose(correlation_matrix(logits + np.array([[3.0], [-7.0], [5.0]])), found)


def test_correlations_of_a_copy_are_the_teachers() -> None:
    panels = class_correlations(STUDENTS, TEACHER).axes[:2]
    gap = np.abs(correlation_matrix(STUDENT) - correlation_matrix(TEACHER))
    np.testing.assert_allclose(panels[0].images[0].get_array(), gap)
    assert [panel.get_title() for panel in panels] == [f"student: mean {gap.mean():.3f}", "copy: mean 0.000"]


def test_terms_by_class_are_means_of_its_rows() -> None:
    panels = terms_by_class(STUDENTS, TEACHER, LABELS, temperature=2.0).axes
    terms = decoupled_kl(torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS), temperature=2.0)
    for panel, term in zip(panels, terms, strict=True):
        means = [term[label == LABELS].mean().item() for label in range(6)]
        np.testing.assert_allclose(panel.lines[0].get_ydata(), sorted(means, reverse=True))
        np.testing.assert_allclose(panel.lines[1].get_ydata(), 0, atol=1e-12)


def test_reliability_tells_the_calibration_error() -> None:
    panels = reliability_diagram({"teacher": TEACHER, "student": STUDENT}, LABELS).axes
    metric = ExpectedCalibrationError()
    for panel, (name, logits) in zip(panels, {"teacher": TEACHER, "student": STUDENT}.items(), strict=True):
        error = metric.compute(predictions=logits, references=LABELS)["expected_calibration_error"]
        assert panel.get_title() == f"{name}: error {error:.3f}"


def test_t_sne_shows_the_classes_asked_for() -> None:
    names = [f"class {label}" for label in range(6)]
    figure = tsne(dict(zip(("teacher", "student"), FEATURES, strict=True)), LABELS, names, max_classes=4)
    assert [axes.get_title() for axes in figure.axes] == ["teacher", "student"]
    assert all(sum(len(c.get_offsets()) for c in axes.collections) == 40 for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names[:4]
    assert len(tsne({"one": FEATURES[0]}, LABELS, names).axes) == 1


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: class_correlations({}, TEACHER), "no models to draw"),
        (lambda: class_correlations({"kd": STUDENT[:, :4]}, TEACHER), r"'kd' .* is \(60, 4\); expected \(60, 6\)"),
        (lambda: terms_by_class({"kd": STUDENT[:9]}, TEACHER, LABELS), r"'kd' .* is \(9, 6\); expected \(60, 6\)"),
        (lambda: terms_by_class(STUDENTS, TEACHER, LABELS[:9]), r"'teacher' .* is \(60, 6\); expected \(9, …\)"),
        (lambda: tsne({"kd": STUDENT[:, 0]}, LABELS, []), r"'kd' .* is \(60,\); expected \(60, …\)"),
        (lambda: reliability_diagram({"kd": STUDENT}, LABELS[:9]), r"'kd' .* is \(60, 6\); expected \(9, …\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
