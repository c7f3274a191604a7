"""Matthews correlation of predicted classes and labels, which a majority class does not flatter (CoLA's metric)."""

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class MatthewsCorrelation(evaluate.Metric):
    """`compute(predictions=classes (N,), references=labels (N,))` → `{"matthews_correlation": value in [-1, 1]}`."""

    def _info(self) -> evaluate.MetricInfo:
        classes = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(classes))

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
