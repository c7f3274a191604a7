"""Rows of student and teacher brought to the same classes, and what their labels and classes must be."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import Head
from .losses.truncated import TopOutputs
from .rows import IGNORE_INDEX

# Vocabularies are padded to a multiple of at most this many rows; what differs by more, or by more than an eighth, is
# another vocabulary.
_MOST_PADDING_ROWS = 1024


class Rows(NamedTuple):
    """Rows of student and teacher over the same classes, (R, C) each, and their labels (R,), -100 for none."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    mixed: Tensor | None = None
    """(R, C) shares of the classes in mixed examples; their label is the class of the largest share."""
    per_example: int = 1
    """How many rows make up one example: one for each label of a multi-label head, whose mean counts."""
    by_teacher: Tensor | None = None
    """(R,) booleans, where the teacher chose the label."""
    top: TopOutputs | None = None
    """All that is known of the teacher, whose rows (R, k) are then those of its top k logits."""
    positions: Tensor | None = None
    """(R,), with `top`: which of the student's rows (M, C) they stand beside."""

    def agreement(self) -> Tensor:
        """(R,) booleans: the argmaxes of student and teacher are the same class."""
        return self.student.argmax(1) == self.teacher.argmax(1)

    def teacher_hits(self) -> Tensor:
        """(R,) booleans: the teacher's argmax is the label."""
        best = self.teacher.argmax(1) if self.top is None else self.top.indices[:, 0]
        return best == self.labels


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise a `ValueError` for a label outside `classes`; on a CPU only, where reading values costs nothing."""
    if labels.device.type != "cpu":
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORE_INDEX)]
    if len(wrong):
        raise ValueError(
            f"label {wrong[0].item()} is outside [0, {classes}), the classes of student and teacher. Mark positions "
            f"without a label by {IGNORE_INDEX}."
        )


def check_one_label(head: Head, labels: Tensor) -> None:
    """Raise a `ValueError` for class indices of several labels per example, which are not told from other numbers."""
    if head is Head.CLASSIFICATION and labels.ndim > 1:
        raise ValueError(
            f"The labels are {labels.dtype} of shape {tuple(labels.shape)}: expected one class index for each example, "
            "or a float for each class (cast them to float)."
        )


def check_weights(head: Head, weights: Tensor | None, logits: Tensor) -> None:
    """Raise a `ValueError` for `class_weights` that are not one for each of the logits (N, C), or on a CPU for those of
    several labels that are not 0 to 1.
    """
    if weights is None:
        return
    if weights.shape != logits.shape:
        raise ValueError(
            f"The labels have shape {tuple(weights.shape)} for logits of shape {tuple(logits.shape)}: expected a "
            "number for each class."
        )
    if head is Head.MULTI_LABEL and weights.device.type == "cpu" and ((weights < 0) | (weights > 1)).any():
        raise ValueError(
            f"The labels go from {weights.min():g} to {weights.max():g}; several labels per example are 0 or 1 each. "
            "An example without labels cannot stand among others that have them."
        )


def check_mixed(weights: Tensor) -> None:
    """Raise a `ValueError` for weights (N, C) that are not shares of one or two classes. Reads the device."""
    positive = int((weights > 0).sum(1).max())
    if ((weights < 0).any(1) | ((weights.sum(1) - 1).abs() > 1e-2)).any():
        raise ValueError(
            "The labels are class weights with rows that are negative or do not sum to 1. Mixed examples have shares "
            'of classes; for several labels an example set config.problem_type = "multi_label_classification".'
        )
    if positive > 2:
        raise ValueError(
            f"An example has {positive} classes of positive weight; mixing gives two. Leave smoothing to the "
            "hard-label loss: label_smoothing_factor in the training arguments, not in the collator."
        )


def aligned_rows(
    head: Head,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    order: Tensor | None = None,
    weights: Tensor | None = None,
) -> Rows:
    """Bring rows of student (R, C) and teacher (R, C) to the same classes.

    Args:
        labels: (R,), -100 where a row has none.
        order: the teacher's column for each of the student's classes; see `class_order`. Vocabularies that differ in
            padding rows are cut to the rows they share.
        weights: (R, C), the `class_weights`, if any. The rows of a multi-label head become R·C rows of two classes.

    Raises:
        ValueError: for different numbers of classes, a single class, or, on a CPU, labels outside the classes.
    """
    teacher = in_order(teacher, order)
    student_classes, teacher_classes = student.shape[1], teacher.shape[1]
    if head.has_vocabulary and differ_in_padding(student_classes, teacher_classes):
        shared = min(student_classes, teacher_classes)
        student, teacher = student[:, :shared], teacher[:, :shared]
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(other_classes(head, student_classes, teacher_classes))
    if head is Head.MULTI_LABEL:
        return _rows_of_each_label(student, teacher, labels, weights)
    if student.shape[1] < 2:
        raise ValueError(
            "The student's head has one output, as for regression. Distillation needs at least two classes."
        )
    if weights is not None:
        labels = torch.where(labels == IGNORE_INDEX, labels, weights.argmax(1))
    check_labels(labels, student.shape[1])
    return Rows(student, teacher, labels.long(), weights)


def labelled_by_teacher(aligned: Rows, chosen: Tensor) -> Rows:
    """`aligned` with the teacher's most likely class as the label of the rows that are `chosen` (R,)."""
    if aligned.per_example > 1:  # whose labels are the teacher's decisions already
        return aligned._replace(by_teacher=chosen.repeat_interleave(aligned.per_example))
    return aligned._replace(labels=torch.where(chosen, aligned.teacher.argmax(1), aligned.labels), by_teacher=chosen)


def other_classes(head: Head, student_classes: int, teacher_classes: int) -> str:
    """The message for models of different numbers of classes."""
    return f"The student has {student_classes} classes and the teacher {teacher_classes}. They must have the same" + (
        ", but for padding rows at the end of a shared vocabulary: use models with the same tokenizer."
        if head.has_vocabulary
        else " classes: train the teacher on the student's labels."
    )


def in_order(logits: Tensor, order: Tensor | None) -> Tensor:
    """The teacher's logits (..., C) with their columns in the student's order."""
    return logits if order is None or logits.shape[-1] != len(order) else logits.index_select(-1, order)


def class_order(student_names: Sequence[str] | None, teacher_names: Sequence[str] | None) -> list[int] | None:
    """The teacher's column for each of the student's classes, by name; None where the columns stand in the same order.

    Names such as LABEL_0 only number the columns, so they match in order.

    Raises:
        ValueError: where both name their classes and the names differ in content.
    """
    if student_names is None or teacher_names is None:
        return None
    student_names, teacher_names = list(student_names), list(teacher_names)
    if student_names == teacher_names or _are_generic(student_names) or _are_generic(teacher_names):
        return None
    only_student = [name for name in student_names if name not in teacher_names]
    only_teacher = [name for name in teacher_names if name not in student_names]
    if only_student or only_teacher:
        raise ValueError(
            f"Student and teacher name different classes: the teacher lacks {_listed(only_student)}, the student lacks "
            f"{_listed(only_teacher)}. Set id2label of both to the same names, or tell the teacher's with "
            "Teacher(model, label_names=[...])."
        )
    for names in (student_names, teacher_names):
        if len(set(names)) < len(names):
            raise ValueError(f"Class names repeat, so they tell no order: {_listed(names)}. Make id2label unique.")
    return [teacher_names.index(name) for name in student_names]


def _rows_of_each_label(student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor | None) -> Rows:
    # A logit z and its sigmoid are the softmax of (0, z). Without labels, the teacher's decision is the target.
    student_pairs, teacher_pairs = (
        torch.stack((torch.zeros_like(logits), logits), dim=-1).flatten(0, 1) for logits in (student, teacher)
    )
    present = (teacher > 0 if weights is None else weights > 0.5).long()
    targets = torch.where(labels.unsqueeze(1) == IGNORE_INDEX, labels.unsqueeze(1), present)
    return Rows(student_pairs, teacher_pairs, targets.flatten(), per_example=student.shape[1])


def differ_in_padding(size: int, other: int) -> bool:
    """Whether vocabularies of these sizes are one vocabulary with different padding rows at its end."""
    difference, larger = abs(size - other), max(size, other)
    return difference < _MOST_PADDING_ROWS and 8 * difference <= larger


def _are_generic(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return (shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "none"
