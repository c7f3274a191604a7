"""Top-k accuracy: the share of examples whose label is among the k classes of the largest logits."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import top_k_accuracy_score


class TopKAccuracy(evaluate.Metric):
    """`compute(predictions=logits (N, C), references=labels (N,), k=5)` → `{"top_5_accuracy": share in [0, 1]}`."""

    def _info(self) -> evaluate.MetricInfo:
        rows = {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(rows))

    def _compute(self, predictions: list[list[float]], references: list[int], k: int = 5) -> dict[str, float]:
        logits = np.asarray(predictions)
        if not 0 < k <= logits.shape[1]:
            raise ValueError(f"k is {k}; expected 1 to {logits.shape[1]}, the number of classes.")
        if k == logits.shape[1]:
            return {f"top_{k}_accuracy": 1.0}
        # For two classes scikit-learn expects one score an example.
        scores = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits
        score = top_k_accuracy_score(references, scores, k=k, labels=np.arange(logits.shape[1]))
        return {f"top_{k}_accuracy": float(score)}
