"""What the pass over rows computes: its weights, and the terms it finds. See `row_pass`."""

from typing import NamedTuple

import torch
from torch import Tensor

TEACHER_UNUSABLE = 1
STUDENT_MASKS = 2


class Weights(NamedTuple):
    """What a row's loss is made of: ce_weight·CE + T²·(alpha·TCKD + beta·NCKD).

    `classical`: alpha weighs KL over all classes, TCKD + (1 − b)·NCKD, instead of TCKD, and beta is not used.
    A `ce_weight` of None, unlike 0, spares the computation of CE.
    """

    alpha: float
    beta: float
    temperature: float
    ce_weight: float | None = None
    classical: bool = False


class Partition(NamedTuple):
    """Three groups of classes for each row instead of target and rest; see `grouped`.

    TCKD is then the divergence between them, NCKD that among the last group; `second_beta` weighs the one among the
    second group.
    """

    top_k: int = 0
    """The teacher's first class, its second to k-th, and the others."""
    mixed: Tensor | None = None
    """(N, C), shares of the classes in mixed examples: each of the two alone, and the others. Not read with `top_k`."""
    second_beta: float = 0.0


class RowTerms(NamedTuple):
    """What the pass finds for each row, (N,), in float32 (float64 for float64 logits), without gradient.

    Of ignored rows everything is 0.
    """

    ce: Tensor
    """Cross-entropy of the student at the label, at T = 1; 0 where its weight is None."""
    tckd: Tensor
    nckd: Tensor
    second: Tensor
    """The divergence among the second group of a `Partition`."""
    dkd: Tensor
    """T²·(α·TCKD + β·NCKD), or classical T²·α·KL."""
    agrees: Tensor
    """Booleans: both models choose the same class, the first of equals."""
    fault: Tensor
    """uint8: `TEACHER_UNUSABLE` for a teacher's row with NaN, +inf or no finite non-target logit, `STUDENT_MASKS`
    where the student masks (-inf) a class to which the teacher gives mass, or 0."""


def terms_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The type that rows of these logits are computed in: float32, or float64 where one of them is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def kinds_of_terms(dtype: torch.dtype) -> list[torch.dtype]:
    """The type of each of the `RowTerms` of rows that are computed in `dtype`."""
    return [dtype] * 5 + [torch.bool, torch.uint8]
