"""Every metric against numbers counted by hand or an independent formula, and through `evaluate.load` by path."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

import hf_dkd
from hf_dkd import metrics

from .. import oracle

FOLDER = Path(hf_dkd.__file__).parent / "metrics"


def test_accuracy_counts_hits() -> None:
    assert metrics.Accuracy().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def test_top_k_counts_labels_among_the_k_largest() -> None:
    logits = [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]
    labels = [0, 1, 2, 0]
    top_k = metrics.TopKAccuracy()
    assert top_k.compute(predictions=logits, references=labels, k=1) == {"top_1_accuracy": 0.25}
    assert top_k.compute(predictions=logits, references=labels, k=2) == {"top_2_accuracy": 0.5}
    assert top_k.compute(predictions=logits, references=labels, k=3) == {"top_3_accuracy": 1.0}


def test_top_k_of_two_classes() -> None:
    found = metrics.TopKAccuracy().compute(predictions=[[0.0, 1.0], [1.0, 0.0]], references=[1, 1], k=1)
    assert found == {"top_1_accuracy": 0.5}


def test_top_k_refuses_more_than_the_classes() -> None:
    with pytest.raises(ValueError, match=r"k is 4; expected 1 to 3"):
        metrics.TopKAccuracy().compute(predictions=[[3.0, 2.0, 1.0]], references=[0], k=4)


def test_f1_by_hand() -> None:
    # Class 0: precision 1/2, recall 1; class 1: precision 1, recall 1/3.
    labels, predictions = [0, 1, 1, 1], [0, 1, 0, 2]
    macro = metrics.F1().compute(predictions=predictions, references=labels)
    assert macro == {"f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}
    assert metrics.F1().compute(predictions=[1, 1, 0], references=[1, 0, 1], average="binary") == {"f1": 0.5}


def test_matthews_correlation_by_hand() -> None:
    # Two true and one false positive, one true and no false negative: (2·1 − 1·0) / √(3·2·2·1).
    found = metrics.MatthewsCorrelation().compute(predictions=[1, 1, 1, 0], references=[1, 1, 0, 0])
    assert found == {"matthews_correlation": pytest.approx(2 / 12**0.5)}


def test_entities_count_only_whole() -> None:
    references = [["B-person", "I-person", "O", "B-location"], ["O", "O"]]
    predictions = [["B-person", "O", "O", "B-location"], ["B-group", "O"]]
    found = metrics.EntityF1().compute(predictions=predictions, references=references)
    assert found == {"precision": pytest.approx(1 / 3), "recall": 0.5, "f1": pytest.approx(0.4)}


def test_agreement_counts_equal_choices() -> None:
    student, teacher = [[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]], [[5.0, 4.0], [1.0, 0.0], [0.0, 1.0]]
    found = metrics.TeacherAgreement().compute(predictions=student, references=teacher)
    assert found == {"teacher_agreement": pytest.approx(2 / 3)}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_teacher_kl_is_the_oracles(temperature: float) -> None:
    student, teacher = torch.randn(2, 50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, _, kl, _ = oracle.divergences(student, teacher, torch.zeros(50, dtype=torch.long), temperature)
    found = metrics.TeacherKL().compute(
        predictions=student.numpy(), references=teacher.numpy(), temperature=temperature
    )
    assert found == {"teacher_kl": pytest.approx(kl.mean().item(), rel=1e-12)}


def test_the_metrics_of_a_classifier_are_those_of_its_parts() -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 40, 7))
    labels = np.arange(40) % 7
    prediction = EvalPrediction(student, labels)
    found = metrics.classification_metrics(prediction)
    names = {"accuracy", "top_5_accuracy", "f1", "matthews_correlation", "expected_calibration_error"}
    assert set(found) == names
    assert found["accuracy"] == np.mean(student.argmax(1) == labels)
    prediction.teacher_logits = teacher
    with_teacher = metrics.classification_metrics(prediction)
    assert with_teacher["teacher_agreement"] == np.mean(student.argmax(1) == teacher.argmax(1))
    assert with_teacher["teacher_kl"] > 0
    assert found.items() <= with_teacher.items()
    assert "top_5_accuracy" not in metrics.classification_metrics(EvalPrediction(student[:, :5], labels % 5))


def _logits(*confidences: float) -> list[list[float]]:
    """Two-class logits that choose class 1 with these probabilities."""
    return [[0.0, math.log(p / (1 - p))] for p in confidences]


def test_calibration_error_by_hand() -> None:
    # Four examples at confidence 0.9, two right; one at 0.6, right.
    logits, labels = _logits(0.9, 0.9, 0.9, 0.9, 0.6), [1, 1, 0, 0, 1]
    found = metrics.ExpectedCalibrationError().compute(predictions=logits, references=labels, bins=10)
    assert found == {"expected_calibration_error": pytest.approx((4 * 0.4 + 1 * 0.4) / 5)}


def test_reliability_sorts_into_half_open_bins() -> None:
    found = metrics.reliability(np.array(_logits(0.6, 0.95, 0.95)), np.array([0, 1, 0]), bins=4)
    assert found.examples.tolist() == [0, 0, 1, 2]
    assert found.confidence[2:] == pytest.approx([0.6, 0.95])
    assert found.accuracy[2:].tolist() == [0.0, 0.5]
    assert np.isnan(found.accuracy[:2]).all()


def test_calibration_of_certain_predictions() -> None:
    found = metrics.ExpectedCalibrationError().compute(predictions=[[0.0, 1e3], [1e3, 0.0]], references=[1, 0])
    assert found == {"expected_calibration_error": 0.0}


def test_every_module_loads_by_path() -> None:
    others = ("__init__.py", "classification.py", "language.py", "predictions.py", "tagging.py")
    files = sorted(path for path in FOLDER.glob("*.py") if path.name not in others)
    loaded = [evaluate.load(str(path)) for path in files]
    assert len(loaded) == 10
    assert loaded[0].compute(predictions=[1], references=[1]) == {"accuracy": 1.0}


def test_scores_are_sums_over_labelled_positions() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, -100, 1, 2], [0, 4, 2, -100]])
    scores = metrics.token_scores((logits, "cache"), labels)
    for row, places in enumerate(([(1, 1), (2, 2)], [(0, 4), (1, 2)])):
        losses = [-logits[row, place].log_softmax(-1)[label] for place, label in places]
        hits = sum(int(logits[row, place].argmax() == label) for place, label in places)
        assert scores[row].tolist() == pytest.approx([sum(losses).item(), 2, hits])


def test_perplexity_is_over_all_tokens_not_a_mean_of_examples() -> None:
    scores = np.array([[6.0, 3, 1], [1.0, 1, 1]])
    found = metrics.language_metrics(EvalPrediction(predictions=scores, label_ids=scores))
    assert found == {"perplexity": pytest.approx(math.exp(7 / 4)), "token_accuracy": 0.5}


def test_the_metrics_of_a_tagger_see_tagged_tokens_alone() -> None:
    names = ["O", "B-x", "I-x"]
    labels = np.array([[-100, 1, 2, 0, -100], [0, 1, -100, 1, 0]])
    chosen = np.array([[2, 1, 2, 0, 2], [0, 1, 2, 0, 0]])
    prediction = EvalPrediction(predictions=10 * np.eye(3)[chosen], label_ids=labels)
    assert metrics.tag_lists(names, chosen, labels) == [["B-x", "I-x", "O"], ["O", "B-x", "O", "O"]]
    found = metrics.tagging_metrics(names, prediction)
    assert found == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": 0.8, "accuracy": 6 / 7})

    teacher = np.where(labels[..., None] == -100, -prediction.predictions, prediction.predictions)
    teacher[1, 3] = [0, 10, 0]
    prediction.teacher_logits = teacher
    found = metrics.tagging_metrics(names, prediction)
    gap = 10 * (math.exp(10) - 1) / (math.exp(10) + 2)
    assert (found["teacher_agreement"], found["teacher_kl"]) == (pytest.approx(6 / 7), pytest.approx(gap / 7))
