"""Teacher agreement: the share of examples for which student and teacher choose the same class, right or wrong."""

import datasets
import evaluate
import numpy as np


class TeacherAgreement(evaluate.Metric):
    """`compute(predictions=student's logits (N, C), references=teacher's logits (N, C))` → `{"teacher_agreement"}`."""

    def _info(self) -> evaluate.MetricInfo:
        logits = {name: datasets.List(datasets.Value("float32")) for name in ("predictions", "references")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(logits))

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        same = np.argmax(predictions, axis=1) == np.argmax(references, axis=1)
        return {"teacher_agreement": float(same.mean())}
