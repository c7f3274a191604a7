"""Accuracy: the share of examples whose predicted class is the label."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """`compute(predictions=classes (N,), references=labels (N,))` → `{"accuracy": share in [0, 1]}`."""

    def _info(self) -> evaluate.MetricInfo:
        classes = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(classes))

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
