"""(outputs, labels) of any head → rows: one row of logits and one label for each decision that is trained.

A label of -100 marks a position without a decision. `aligned_labels` puts every label where its logits stand, so that
what follows is the same for all heads: compare shapes, keep the labelled rows, align the classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .heads import Head

IGNORE_INDEX = -100

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


def label_columns(head: Head, label_names: Sequence[str] = ("labels",)) -> tuple[str, ...]:
    """The columns of a batch that hold the labels; `label_names` is Trainer's, for models with other names."""
    if head is Head.QUESTION_ANSWERING:
        return ("start_positions", "end_positions")
    return ("labels",) if "labels" in label_names or not label_names else tuple(label_names[:1])


def has_labels(head: Head, batch: Mapping[str, Any], label_names: Sequence[str] = ("labels",)) -> bool:
    """Whether `batch` brings labels for `head`."""
    if head is Head.CAUSAL_LM and batch.get("shift_labels") is not None:
        return True
    return all(batch.get(name) is not None for name in label_columns(head, label_names))


def aligned_labels(head: Head, batch: Mapping[str, Any], label_names: Sequence[str] = ("labels",)) -> Tensor:
    """Labels where their logits stand: (B,), (B, L), or (2, B) start and end positions; -100 where there is no label.

    Zeros for examples with a weight for each class instead of a label: see `class_weights`.

    Raises:
        ValueError: where the batch has no labels, or float labels as for regression.
    """
    if not has_labels(head, batch, label_names):
        raise ValueError(
            f"The batch has no labels for a {head} head: expected {', '.join(label_columns(head, label_names))} among "
            f'its columns, got {", ".join(batch)}. With dkd_target="teacher" training needs none.'
        )
    if head is Head.QUESTION_ANSWERING:
        return _aligned_positions(batch)
    if head is Head.CAUSAL_LM and batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch[label_columns(head, label_names)[0]]
    if class_weights(head, batch, label_names) is not None:
        return torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    if labels.is_floating_point():
        raise ValueError(
            f"The labels are {labels.dtype} of shape {tuple(labels.shape)}, as for regression. Distilling a {head} "
            "head takes one class index per decision (torch.int64)."
        )
    if head is Head.CAUSAL_LM:
        return pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    if head in (Head.CLASSIFICATION, Head.MULTIPLE_CHOICE) and labels.numel() == len(labels):
        return labels.reshape(-1)
    return labels


def class_weights(head: Head, batch: Mapping[str, Any], label_names: Sequence[str] = ("labels",)) -> Tensor | None:
    """The labels of classified examples that have a number for each class, (B, C); None where they have not.

    Of a multi-label head they are 0 or 1, of others the shares of the classes in a mixed example.
    """
    if head not in (Head.CLASSIFICATION, Head.MULTI_LABEL):
        return None
    labels = batch.get(label_columns(head, label_names)[0])
    many = isinstance(labels, Tensor) and labels.ndim == 2 and (head is Head.MULTI_LABEL or labels.is_floating_point())
    return labels if many else None


def count_labelled(head: Head, batch: Mapping[str, Any], label_names: Sequence[str] = ("labels",)) -> Tensor:
    """The number of labelled rows in `batch`, a scalar on its device. Float labels count one row an example."""
    if head is not Head.QUESTION_ANSWERING:
        labels = batch.get(label_columns(head, label_names)[0])
        if labels is not None and labels.is_floating_point():
            return torch.tensor(len(labels), device=labels.device)
    return (aligned_labels(head, batch, label_names) != IGNORE_INDEX).sum()


def without_labels_from(
    head: Head, batch: Mapping[str, Any], first: int, label_names: Sequence[str] = ("labels",)
) -> dict[str, Any]:
    """A copy of `batch` whose examples from index `first` on have no label. Float labels stay as they are."""
    changed = dict(batch)
    for name in (*label_columns(head, label_names), "shift_labels"):
        labels = batch.get(name)
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            # Question answering ignores positions past the end of the window instead.
            ignored = torch.iinfo(labels.dtype).max if head is Head.QUESTION_ANSWERING else IGNORE_INDEX
            changed[name] = labels.clone()
            changed[name][first:] = ignored
    return changed


def with_some_label(
    head: Head, batch: Mapping[str, Any], count: Tensor, label_names: Sequence[str] = ("labels",)
) -> dict[str, Any]:
    """`batch`, with one label made up where `count`, its labelled rows, is 0: a mean over labels is then never 0/0.

    That loss is to be multiplied by `count`. Nothing is read from the device.
    """
    changed = dict(batch)
    for name in (*label_columns(head, label_names), "shift_labels"):
        labels = batch.get(name)
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            made_up = labels.clone(memory_format=torch.contiguous_format)
            made_up.view(-1)[-1:] = 0
            changed[name] = torch.where(count > 0, labels, made_up)
    return changed


def logits_of(outputs: Any, whose: str, head: Head | None = None) -> Tensor:
    """The logits in a model's outputs: (B, C), (B, L, C), or start and end logits as (2, B, L).

    Raises:
        ValueError: where there are none, as with heads that fuse their loss.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        if outputs.get("logits") is not None:
            return outputs["logits"]
        if outputs.get("start_logits") is not None and outputs.get("end_logits") is not None:
            return torch.stack((outputs["start_logits"], outputs["end_logits"]))
        found = ", ".join(outputs)
    elif isinstance(outputs, Sequence):
        # With `return_dict=False` the loss, a scalar, may come first.
        tensors = [value for value in outputs if isinstance(value, Tensor) and value.ndim >= 2]
        if head is Head.QUESTION_ANSWERING and len(tensors) >= 2:
            return torch.stack(tensors[:2])
        if tensors:
            return tensors[0]
        found = f"a {type(outputs).__name__} without a tensor of two or more dimensions"
    else:
        found = type(outputs).__name__
    raise ValueError(
        f"The {whose}'s outputs hold no logits (found: {found}). Switch off whatever fuses its loss with its head, "
        "such as use_liger_kernel=True or a trainer's own fused loss."
    )


def labelled_positions(head: Head, labels: Tensor) -> Tensor | None:
    """The indices of the labelled rows among all rows of a batch, (R,); None for heads with one or two rows an example.

    Finding them reads the device once, which pays for tokens, most of which may have no label. The other heads take all
    rows, and mask those without a label: nothing is read.
    """
    if head in (Head.CLASSIFICATION, Head.MULTI_LABEL, Head.MULTIPLE_CHOICE, Head.QUESTION_ANSWERING):
        return None
    return (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)


def rows_at(
    logits: Tensor, labels: Tensor, positions: Tensor | None, whose: str, visible: Tensor | None = None
) -> Tensor:
    """The rows of `logits` (..., C) at `positions` among `labels` (...): (R, C).

    Without positions: all rows, those labelled -100 as zeros. `visible` (B, L), the attention mask of a question
    answering head, masks the padding out of its classes.

    Raises:
        ValueError: where logits and labels do not stand side by side.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"The {whose}'s logits have shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}: "
            "expected one row of logits for each label. Student and teacher must see the same positions; `dkd_head` "
            "overrides the kind of head."
        )
    if visible is not None:
        logits = logits.masked_fill(visible == 0, -torch.inf)
    if positions is None:
        return logits.masked_fill((labels == IGNORE_INDEX).unsqueeze(-1), 0.0).flatten(0, -2)
    return logits.flatten(0, -2).index_select(0, positions)


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
    if head.has_vocabulary and _differ_in_padding(student_classes, teacher_classes):
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


def _rows_of_each_label(student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor | None) -> Rows:
    # A logit z and its sigmoid are the softmax of (0, z). Without labels, the teacher's decision is the target.
    student_pairs, teacher_pairs = (
        torch.stack((torch.zeros_like(logits), logits), dim=-1).flatten(0, 1) for logits in (student, teacher)
    )
    present = (teacher > 0 if weights is None else weights > 0.5).long()
    targets = torch.where(labels.unsqueeze(1) == IGNORE_INDEX, labels.unsqueeze(1), present)
    return Rows(student_pairs, teacher_pairs, targets.flatten(), per_example=student.shape[1])


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


def _differ_in_padding(size: int, other: int) -> bool:
    difference, larger = abs(size - other), max(size, other)
    return difference < _MOST_PADDING_ROWS and 8 * difference <= larger


def _aligned_positions(batch: Mapping[str, Any]) -> Tensor:
    inputs = next((batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), None)
    if inputs is None:
        raise ValueError(
            "Question answering ignores positions outside the window, whose length input_ids or inputs_embeds tell: "
            f"the batch has neither, but {', '.join(batch)}."
        )
    window = inputs.shape[1]
    positions = [batch[name].reshape(-1).clamp(0, window) for name in ("start_positions", "end_positions")]
    return torch.stack([position.masked_fill(position == window, IGNORE_INDEX) for position in positions])


def _are_generic(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return (shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "none"
