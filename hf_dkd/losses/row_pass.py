"""One pass over rows of logits: every term of the loss and its gradient, on whatever device they are.

The gradient is derived by hand. With q the softmax over the non-target classes, p and b the probabilities of the target
of student and teacher, all at temperature T, the gradient of a row's T²·(α·TCKD + β·NCKD) is

    αT(p − b) at the target y, and T[β(q_s,i − q_t,i) − α(p − b)·q_s,i] at the other classes i.

`cpu_kernels` and `triton_kernels` have it; what they do not take comes from `row_definition`, a block at a time.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import cpu_kernels
from .row_definition import rows_by_definition
from .row_terms import (
    STUDENT_MASKS,
    TEACHER_UNUSABLE,
    Partition,
    RowTerms,
    Weights,
    kinds_of_terms,
    terms_dtype,
)

__all__ = [
    "STUDENT_MASKS",
    "TEACHER_UNUSABLE",
    "Partition",
    "RowTerms",
    "Weights",
    "kinds_of_terms",
    "row_pass",
    "terms_dtype",
]

_BLOCK_BYTES = {"cpu": 2**22, "other": 2**26}


def row_pass(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Weights,
    partition: Partition | None = None,
    *,
    ignore_index: int = -100,
    scale: Tensor | float = 1.0,
    gradient: Tensor | None = None,
) -> RowTerms:
    """The terms of each row, and in `gradient` that of scale·(sum of the rows' losses) with respect to the student.

    Args:
        student: (N, C), any floating dtype.
        teacher: (N, C).
        labels: (N,), int64.
        scale: a number, or a scalar on the device of the logits.
        gradient: (N, C), to be written, zeros in ignored rows. It may be the student's own memory.
    """
    kernels = _kernels(student, teacher, partition)
    if kernels is not None:
        options: dict[str, Any] = {"ignore_index": ignore_index, "scale": scale, "gradient": gradient}
        return kernels.row_pass(student, teacher, labels, weights, **options)
    found, dtype = [], terms_dtype(student, teacher)
    block_bytes = _BLOCK_BYTES["cpu" if labels.device.type == "cpu" else "other"]
    for rows in _blocks(len(labels), block_bytes // (student.shape[1] * dtype.itemsize)):
        # Leaving rows out would read the device: they are computed, as rows of zeros.
        left_out = labels[rows] == ignore_index
        pair = [logits[rows].to(dtype).masked_fill(left_out.unsqueeze(1), 0.0) for logits in (student, teacher)]
        part = partition
        if partition is not None and partition.mixed is not None:
            part = partition._replace(mixed=partition.mixed[rows])
        factor = None if gradient is None else scale * (~left_out).to(dtype)
        terms, slope = rows_by_definition(
            pair[0], pair[1], labels[rows].masked_fill(left_out, 0), weights, factor, part
        )
        found.append([term.masked_fill(left_out, 0) for term in terms])
        if gradient is not None and slope is not None:
            gradient[rows] = slope.to(gradient.dtype)
    if not found:
        return RowTerms(*(labels.new_zeros(labels.shape, dtype=kind) for kind in kinds_of_terms(dtype)))
    return RowTerms(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _blocks(number: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, number, size)]


def _kernels(student: Tensor, teacher: Tensor, partition: Partition | None) -> Any:
    """The module of kernels that take these logits; None where none does."""
    # With two classes NCKD is 0 exactly, which the rounding of short cuts must not spoil.
    if partition is not None or student.shape[1] == 2:
        return None
    if student.device.type == "cpu":
        return cpu_kernels
    supported = all(
        logits.is_cuda and logits.stride(1) == 1 and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for logits in (student, teacher)
    )
    if not supported or find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels
