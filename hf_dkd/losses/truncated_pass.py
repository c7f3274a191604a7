"""The loss of `truncated`, and the cross-entropy, with the gradient made in the forward, a block of rows at a time.

Over the k + 2 classes of a row, the top k, the target and the tail, the loss and its gradient are those of `row_pass`.
That of the tail's logit, T·logsumexp(s/T), is shared out among the tail's classes by their softmax at T. At T = 1 the
cross-entropy over the k + 2 classes is that over all C.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import empty, given_scale, loss_with_gradient
from .row_pass import RowTerms, Weights, kinds_of_terms, row_pass
from .truncated import TopOutputs, kept_columns, teacher_rows

# Of a block of rows. On a CPU it stays in the cache, and is few calls for each row.
_BLOCK_NUMBERS = {"cpu": 2**20, "other": 2**24}
# Numbers that are worth a call of their own.
_LONG_ROW = 2**12


def weighted_top_rows(
    student: Tensor,
    top: TopOutputs,
    labels: Tensor,
    positions: Tensor,
    weights: Weights,
    *,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, RowTerms]:
    """`chunked.weighted_rows` from what is kept of the teacher: scale·(sum of the rows' losses), and their terms (N,).

    Args:
        student: (M, C), any floating dtype. Its gradient is 0 where no position is.
        top: of the teacher, (N, k), at the temperature of the `weights`.
        labels: (N,), int64 in [0, C).
        positions: (N,), the rows of `student`, each once.
        scale: a number, or a scalar on the device of the logits, from which nothing is read.
    """
    given, gradient = given_scale(student, scale, weights), None
    if student.requires_grad and torch.is_grad_enabled():
        gradient = empty(student.shape, student.dtype, student.device)
        _fill_others(gradient, positions)
    with torch.no_grad():
        terms = _terms(student.detach(), top, labels, positions, weights, given, gradient)
    return loss_with_gradient(student, terms, weights, gradient, scale, given), terms


def _fill_others(gradient: Tensor, positions: Tensor) -> None:
    """Zeros at least in the rows at none of the positions, which to find on a device would be a wait for it."""
    if gradient.device.type != "cpu":
        gradient.zero_()
    elif len(positions) < len(gradient):
        others = (
            torch.ones(len(gradient), dtype=torch.bool, device="cpu").index_fill_(0, positions, False).nonzero()[:, 0]
        )
        _write(gradient, others, gradient.new_zeros(()).expand(len(others), gradient.shape[1]))


def _write(gradient: Tensor, positions: Tensor, rows: Tensor) -> None:
    if gradient.device.type != "cpu" or gradient.shape[1] < _LONG_ROW:
        gradient.index_copy_(0, positions, rows.to(gradient.dtype))
        return
    # Of new memory index_copy_ touches the pages from many places at once, and takes ten times as long.
    for place, row in zip(positions.tolist(), rows, strict=True):
        gradient[place] = row


def _terms(
    student: Tensor,
    top: TopOutputs,
    labels: Tensor,
    positions: Tensor,
    weights: Weights,
    scale: Tensor | float,
    gradient: Tensor | None,
) -> RowTerms:
    dtype = torch.promote_types(torch.promote_types(student.dtype, top.logits.dtype), torch.float32)
    columns, repeated = kept_columns(top, labels)
    teacher = teacher_rows(top, repeated, weights.temperature, dtype)
    found = []
    for rows in _blocks(len(positions), student):
        kept = _Kept(columns[rows], repeated[rows], teacher[rows])
        logits = student.index_select(0, positions[rows]).to(dtype)
        agrees = _argmax(logits) == top.indices[rows, 0]
        terms, slope = _block(logits, kept, weights, None if gradient is None else scale)
        found.append(terms._replace(agrees=agrees))
        if gradient is not None and slope is not None:
            _write(gradient, positions[rows], slope)
    if not found:
        return RowTerms(*(labels.new_zeros(labels.shape, dtype=kind) for kind in kinds_of_terms(dtype)))
    return RowTerms(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class _Kept(NamedTuple):
    """Of a block of rows."""

    columns: Tensor
    """(R, k + 1): the classes of the top k, and the target."""
    repeated: Tensor
    """(R, k + 2) booleans: the target's place among the top k."""
    teacher: Tensor
    """(R, k + 2)."""


def _block(
    logits: Tensor, kept: _Kept, weights: Weights, scale: Tensor | float | None
) -> tuple[RowTerms, Tensor | None]:
    """The terms of a block of rows, and the gradient (R, C) times `scale`; None without one. Overwrites `logits`."""
    of_kept = logits.gather(1, kept.columns)
    logits.scatter_(1, kept.columns, -math.inf)
    tail = _Tail(logits, logits.amax(1, keepdim=True))
    # Of no class at all a softmax is NaN. Some class stands in, without a gradient.
    logits[:, :1].masked_fill_(tail.peak == -math.inf, 0.0)
    apart = weights.ce_weight is not None and weights.temperature != 1
    terms, slope = _at_temperature(tail, of_kept, kept, weights._replace(ce_weight=None) if apart else weights, scale)
    if apart:
        hard, of_hard = _at_temperature(tail, of_kept, kept, Weights(0.0, 0.0, 1.0, weights.ce_weight), scale)
        terms = terms._replace(ce=hard.ce)
        slope = None if slope is None or of_hard is None else slope.add_(of_hard)
    return terms, slope


class _Tail(NamedTuple):
    logits: Tensor
    """(R, C), -inf at the kept classes."""
    peak: Tensor
    """(R, 1), the largest; -inf of none."""


def _at_temperature(
    tail: _Tail, of_kept: Tensor, kept: _Kept, weights: Weights, scale: Tensor | float | None
) -> tuple[RowTerms, Tensor | None]:
    """`_block` of losses that are all at one temperature."""
    temperature, nothing = weights.temperature, tail.peak == -math.inf
    logits = tail.logits
    if temperature != 1:
        logits = (logits - tail.peak.masked_fill(nothing, 0.0)).div_(temperature)
    shares = logits.softmax(1)
    # Not 1: torch's softmax over a large vocabulary is off by a factor.
    total = shares.sum(1, keepdim=True)
    of_tail = tail.peak + temperature * (total / shares.amax(1, keepdim=True)).log()
    student = torch.cat((of_kept, of_tail), dim=1).masked_fill_(kept.repeated, -math.inf)
    target = kept.columns.new_full((len(student),), of_kept.shape[1] - 1)
    if scale is None:
        return row_pass(student, kept.teacher, target, weights), None
    slope = torch.empty_like(student)
    terms = row_pass(student, kept.teacher, target, weights, scale=scale, gradient=slope)
    slope.masked_fill_(kept.repeated, 0.0)
    shares.mul_((slope[:, -1:] / total).masked_fill_(nothing, 0.0))
    return terms, shares.scatter_add_(1, kept.columns, slope[:, :-1])


def _argmax(rows: Tensor) -> Tensor:
    # NumPy's takes a fraction of the time of torch's.
    return torch.from_numpy(rows.numpy().argmax(1)) if rows.device.type == "cpu" else rows.argmax(1)


def _blocks(count: int, student: Tensor) -> Iterable[slice]:
    numbers = _BLOCK_NUMBERS["cpu" if student.device.type == "cpu" else "other"]
    size = max(numbers // student.shape[1], 1)
    return (slice(start, start + size) for start in range(0, count, size))
