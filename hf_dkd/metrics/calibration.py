"""Expected calibration error: how far a model's confidence is from its accuracy (Guo et al. 2017, arXiv 1706.04599)."""

from typing import NamedTuple

import datasets
import evaluate
import numpy as np
from scipy.special import softmax


class Reliability(NamedTuple):
    """Of each bin of confidence, (B,) each: how many examples, their mean confidence and accuracy (NaN if empty)."""

    examples: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Reliability:
    """Sort examples by the probability of their predicted class into `bins` equal intervals of (0, 1].

    Args:
        logits: (N, C).
        labels: (N,) classes.
    """
    probabilities = softmax(np.asarray(logits, dtype=np.float64), axis=1)
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == np.asarray(labels)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(index, weights=values, minlength=bins) / count for values in (confidence, correct)]
    return Reliability(count, *means)


class ExpectedCalibrationError(evaluate.Metric):
    """`compute(predictions=logits (N, C), references=labels (N,), bins=15)` → `{"expected_calibration_error"}`.

    The mean over examples of |accuracy − confidence| of their bin, in [0, 1].
    """

    def _info(self) -> evaluate.MetricInfo:
        rows = {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(rows))

    def _compute(self, predictions: list[list[float]], references: list[int], bins: int = 15) -> dict[str, float]:
        count, confidence, accuracy = reliability(np.asarray(predictions), np.asarray(references), bins)
        gaps = np.nan_to_num(np.abs(accuracy - confidence))
        return {"expected_calibration_error": float((gaps * count).sum() / count.sum())}
