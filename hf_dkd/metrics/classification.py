"""The usual metrics of a classifier in one `compute_metrics`."""

from typing import Any

from transformers import EvalPrediction

from .accuracy import Accuracy
from .calibration import ExpectedCalibrationError
from .f1 import F1
from .matthews import MatthewsCorrelation
from .teacher_agreement import TeacherAgreement
from .teacher_kl import TeacherKL
from .top_k_accuracy import TopKAccuracy


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`: accuracy, top-5 accuracy (of more than five classes), macro F1, Matthews correlation and
    calibration error.

    With `include_for_metrics=["teacher_logits"]` also the teacher's agreement, and the KL divergence from it.
    """
    logits: Any = prediction.predictions
    labels = prediction.label_ids
    classes = logits.argmax(-1)
    metrics = Accuracy().compute(predictions=classes, references=labels)
    if logits.shape[1] > 5:
        metrics |= TopKAccuracy().compute(predictions=logits, references=labels)
    metrics |= F1().compute(predictions=classes, references=labels)
    metrics |= MatthewsCorrelation().compute(predictions=classes, references=labels)
    metrics |= ExpectedCalibrationError().compute(predictions=logits, references=labels)
    if hasattr(prediction, "teacher_logits"):
        for metric in (TeacherAgreement(), TeacherKL()):
            metrics |= metric.compute(predictions=logits, references=prediction.teacher_logits)
    return metrics
