"""F1: the harmonic mean of precision and recall."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """`compute(predictions=classes (N,), references=labels (N,), average="macro")` → `{"f1": value in [0, 1]}`.

    `average` is scikit-learn's: `"macro"`, `"micro"`, `"weighted"`, or `"binary"`, for the class 1 of two.
    """

    def _info(self) -> evaluate.MetricInfo:
        classes = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(classes))

    def _compute(self, predictions: list[int], references: list[int], average: str = "macro") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0.0))}
