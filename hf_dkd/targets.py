"""The target of a row that has no label: the teacher's most likely class, where `dkd_target="teacher"` asks for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import rows
from .heads import Head

PER_EXAMPLE = (Head.CLASSIFICATION, Head.MULTI_LABEL, Head.MULTIPLE_CHOICE)


def distilled(
    head: Head, batch: Mapping[str, Any], label_names: Sequence[str], encoder_decoder: bool = False
) -> tuple[Tensor, Tensor]:
    """The labels where their logits stand, all -100 if the batch has none, and booleans alike: rows to be distilled.

    Those are all examples of a classifier. Of the token heads they are the tokens with a label and those that the
    attention mask lets see, of an encoder-decoder the decoder's mask. Without a mask only the labels tell padding from
    text; without labels either, all tokens are distilled.

    Raises:
        ValueError: where neither labels nor inputs tell which rows there are.
    """
    labels = rows.aligned_labels(head, batch, label_names) if rows.has_labels(head, batch, label_names) else None
    if head in PER_EXAMPLE:
        if labels is None:
            some = next(value for value in batch.values() if isinstance(value, Tensor))
            labels = torch.full((len(some),), rows.IGNORE_INDEX, device=some.device)
        return labels, torch.ones_like(labels, dtype=torch.bool)
    prefix = "decoder_" if encoder_decoder else ""
    mask = batch.get(f"{prefix}attention_mask")
    visible = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if labels is None:
        visible = _all_tokens(batch, prefix) if visible is None else visible
        return torch.full_like(visible, rows.IGNORE_INDEX, dtype=torch.long), visible
    labelled = labels != rows.IGNORE_INDEX
    return labels, labelled if visible is None else visible | labelled


def _all_tokens(batch: Mapping[str, Any], prefix: str) -> Tensor:
    inputs = next((batch[prefix + name] for name in ("input_ids", "inputs_embeds") if prefix + name in batch), None)
    if inputs is None:
        raise ValueError(
            f"Without labels, the tokens that are distilled are those of {prefix}input_ids, which the batch lacks: it "
            f"has {', '.join(batch)}."
        )
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
