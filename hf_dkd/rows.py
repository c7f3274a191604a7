"""(outputs, labels) of any head → rows: one row of logits and one label for each decision that is trained.

A label of -100 marks a position without a decision. `aligned_labels` puts every label where its logits stand, so that
what follows is the same for all heads: compare shapes, keep the labelled rows, and in `classes` align the classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .heads import Head

IGNORE_INDEX = -100


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


def rows_beside(labels: Tensor, logits: Tensor, whose: str, visible: Tensor | None = None) -> Tensor:
    """The logits (..., C) that stand beside `labels` (...) as rows: (R, C).

    `visible` (B, L), the attention mask of a question answering head, masks the padding out of its classes.

    Raises:
        ValueError: where logits and labels do not stand side by side.
    """
    check_beside(logits, labels, whose)
    if visible is not None:
        logits = logits.masked_fill(visible == 0, -torch.inf)
    return logits.flatten(0, -2)


def check_beside(logits: Tensor, labels: Tensor, whose: str) -> None:
    """Raise a `ValueError` where logits (..., C) and labels (...) do not stand side by side."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"The {whose}'s logits have shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}: "
            "expected one row of logits for each label. Student and teacher must see the same positions; `dkd_head` "
            "overrides the kind of head."
        )


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
