"""The target of a row that has no label: the teacher's most likely class, where `dkd_target="teacher"` asks for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor

from . import rows
from .heads import Head

_PER_EXAMPLE = (Head.CLASSIFICATION, Head.MULTI_LABEL, Head.MULTIPLE_CHOICE)


def distilled(
    head: Head, batch: Mapping[str, Any], label_names: Sequence[str], encoder_decoder: bool = False
) -> tuple[Tensor, Tensor]:
    """The labels where their logits stand, all -100 if the batch has none, and booleans alike: rows to be distilled.

    Those are all examples of a classifier, and of the token heads all tokens that the attention mask lets see (of an
    encoder-decoder, the decoder's mask; without one, the labelled positions), whether they have a label or not.

    Raises:
        ValueError: where neither labels nor inputs tell which rows there are.
    """
    labels = rows.aligned_labels(head, batch, label_names) if rows.has_labels(head, batch, label_names) else None
    if head in _PER_EXAMPLE:
        if labels is None:
            some = next(value for value in batch.values() if isinstance(value, Tensor))
            labels = torch.full((find_batch_size(batch),), rows.IGNORE_INDEX, device=some.device)
        return labels, torch.ones_like(labels, dtype=torch.bool)
    visible = _visible(batch, "decoder_" if encoder_decoder else "")
    if labels is None:
        if visible is None:
            inputs = "decoder_input_ids" if encoder_decoder else "input_ids"
            raise ValueError(
                f"Without labels, the tokens that are distilled are those of {inputs}, which the batch lacks: it has "
                f"{', '.join(batch)}."
            )
        labels = torch.full_like(visible, rows.IGNORE_INDEX, dtype=torch.long)
    labelled = labels != rows.IGNORE_INDEX
    return labels, labelled if visible is None else visible | labelled


def filled(labels: Tensor, chosen: Tensor, teacher_logits: Tensor) -> Tensor:
    """`labels` with the teacher's most likely class at the `chosen` rows that have none.

    Args:
        labels: as `distilled` gives them, in any shape (...).
        chosen: the same.
        teacher_logits: (..., C), the student's classes in the student's order.
    """
    return torch.where(chosen & (labels == rows.IGNORE_INDEX), teacher_logits.argmax(-1), labels)


def _visible(batch: Mapping[str, Any], prefix: str) -> Tensor | None:
    mask = batch.get(f"{prefix}attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool()
    inputs = next((batch[prefix + name] for name in ("input_ids", "inputs_embeds") if prefix + name in batch), None)
    return None if inputs is None else torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
