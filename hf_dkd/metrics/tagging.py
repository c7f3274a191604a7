"""The usual metrics of a tagger of words in one `compute_metrics`."""

from collections.abc import Sequence
from typing import Any

from transformers import EvalPrediction

from .accuracy import Accuracy
from .entity_f1 import EntityF1
from .teacher_agreement import TeacherAgreement
from .teacher_kl import TeacherKL

IGNORED = -100


def tagging_metrics(names: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`, as `partial(tagging_metrics, names)`: precision, recall and F1 of entities, and accuracy.

    With `include_for_metrics=["teacher_logits"]` also the teacher's agreement, and the KL divergence from it, over the
    tokens that carry a tag.

    Args:
        names: the tags, such as `"B-person"`, by number.
        prediction: logits (N, L, C), and labels (N, L) with -100 at the tokens without a tag.
    """
    logits: Any = prediction.predictions
    labels: Any = prediction.label_ids
    classes, kept = logits.argmax(-1), labels != IGNORED
    tags = {"predictions": tag_lists(names, classes, labels), "references": tag_lists(names, labels, labels)}
    metrics = EntityF1().compute(**tags)
    metrics |= Accuracy().compute(predictions=classes[kept], references=labels[kept])
    if hasattr(prediction, "teacher_logits"):
        for metric in (TeacherAgreement(), TeacherKL()):
            metrics |= metric.compute(predictions=logits[kept], references=prediction.teacher_logits[kept])
    return metrics


def tag_lists(names: Sequence[str], classes: Any, labels: Any) -> list[list[str]]:
    """The names of `classes` (N, L) where `labels` (N, L) hold a tag: a list for each of the N texts."""
    return [[names[index] for index in row[kept]] for row, kept in zip(classes, labels != IGNORED, strict=True)]
