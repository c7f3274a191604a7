"""The pass over rows on a CPU, a block of rows at a time: see `row_pass`.

Blocks are small enough to stay in the processor's cache: memory is read and written once, and nothing of the size of
the logits exists but the gradient. What there is one number of for each row is computed by NumPy, whose operations on
few numbers cost less than torch's.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .row_definition import rows_by_autograd
from .row_terms import RowTerms, Weights, kinds_of_terms, terms_dtype

_BLOCK_BYTES = 2**22
# Of the target against the rest: beyond, the smaller of the two has few digits left in float32.
_WIDEST_ODDS = 60.0
# The logarithm of a mass of 0 would be a warning; of this one it marks the row as wide.
_LEAST_MASS = 1e-37
# Of the largest logit and T: the quotient is rounded, by more than a teacher torn between two distant classes allows.
_LARGEST_QUOTIENT = 128.0


def row_pass(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Weights,
    *,
    ignore_index: int = -100,
    scale: Tensor | float = 1.0,
    gradient: Tensor | None = None,
) -> RowTerms:
    """`row_pass.row_pass` on a CPU; rows without a label are left out."""
    dtype, targets = terms_dtype(student, teacher), labels.numpy()
    kept = targets != ignore_index
    chosen = None if kept.all() else kept.nonzero()[0]
    if chosen is not None and gradient is not None:
        gradient[torch.from_numpy(~kept)] = 0.0
    count, classes = len(targets) if chosen is None else len(chosen), student.shape[1]
    size = max(1, min(count, _BLOCK_BYTES // (classes * dtype.itemsize)))
    memory = torch.empty(4, size, classes, dtype=dtype)
    factor = None if gradient is None else float(scale)
    found = []
    for start in range(0, count, size):
        end = min(start + size, count)
        at = slice(start, end) if chosen is None else chosen[start:end]
        rows: Any = at if chosen is None else torch.from_numpy(at)
        block = student[rows].to(dtype), teacher[rows].to(dtype), targets[at]
        terms, slope = _block(*block, weights, factor, memory[:, : end - start])
        found.append(terms)
        if gradient is not None and slope is not None:
            gradient[rows] = slope.to(gradient.dtype)
    if not found:
        return RowTerms(*(torch.zeros(len(targets), dtype=kind) for kind in kinds_of_terms(dtype)))
    numbers, agrees, fault = (
        found[0] if len(found) == 1 else (np.concatenate(parts, -1) for parts in zip(*found, strict=True))
    )
    if chosen is not None:
        numbers, agrees, fault = (_among(len(targets), chosen, values) for values in (numbers, agrees, fault))
    ce, tckd, nckd, second, dkd = torch.from_numpy(numbers).unbind()
    return RowTerms(ce, tckd, nckd, second, dkd, torch.from_numpy(agrees), torch.from_numpy(fault))


def _among(number: int, chosen: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """`values` (..., R) at the chosen places among `number`, 0 elsewhere."""
    whole = np.zeros((*values.shape[:-1], number), values.dtype)
    whole[..., chosen] = values
    return whole


class _Found(NamedTuple):
    """`RowTerms` as arrays."""

    numbers: NDArray[Any]
    """(5, R): ce, tckd, nckd, second, dkd."""
    agrees: NDArray[np.bool_]
    fault: NDArray[np.uint8]


def _block(
    student: Tensor, teacher: Tensor, targets: NDArray[Any], weights: Weights, scale: float | None, memory: Tensor
) -> tuple[_Found, Tensor | None]:
    """The terms of a block of rows, and the gradient (R, C) times `scale`; None without a scale."""
    alpha, beta, temperature, ce_weight, classical = weights
    rows = np.arange(len(targets))
    s_others, t_others, gaps, hard_others = memory.unbind()
    s_rest, s_odds = _divided(student, rows, targets, temperature, s_others)
    t_rest, t_odds = _divided(teacher, rows, targets, temperature, t_others)
    torch.sub(teacher, student, out=gaps)
    target_gap = gaps.numpy()[rows, targets]
    gaps.numpy()[rows, targets] = 0.0
    gap = gaps.mul_(t_others).sum(1).numpy()
    if not np.isfinite(gap).all():
        # A class that the teacher masks is at an infinite distance, which counts for nothing.
        gap = gaps.masked_fill_(teacher == -torch.inf, 0.0).sum(1).nan_to_num_(torch.nan, torch.nan, torch.nan).numpy()
        target_gap = np.where(np.isfinite(target_gap), target_gap, np.nan)
    # Probabilities of the target and of the rest; none is a difference, so that all keep their digits.
    log_p, log_p_rest = _log_probabilities(s_odds)
    log_b, log_b_rest = _log_probabilities(t_odds)
    p, p_rest, b, b_rest = np.exp(log_p), np.exp(log_p_rest), np.exp(log_b), np.exp(log_b_rest)
    tckd = b * (log_b - log_p) + b_rest * (log_b_rest - log_p_rest)
    nckd = (gap / t_rest - target_gap) / temperature + (t_odds - s_odds)
    ce, ce_rest, widest = -log_p, p_rest, np.maximum(abs(s_odds), abs(t_odds))
    if ce_weight is not None and temperature != 1:
        hard_rest, hard_odds = _divided(student, rows, targets, 1.0, hard_others)
        log_hard, log_hard_rest = _log_probabilities(hard_odds)
        ce, ce_rest = -log_hard, np.exp(log_hard_rest)
        widest = np.maximum(widest, abs(hard_odds))
    of_others = alpha * b_rest if classical else beta
    dkd = temperature**2 * (alpha * tckd + of_others * nckd)
    s_top, t_top = student.numpy().argmax(1), teacher.numpy().argmax(1)
    numbers = np.zeros((5, len(rows)), tckd.dtype)
    numbers[1], numbers[2], numbers[4] = tckd, nckd, dkd
    if ce_weight is not None:
        numbers[0] = ce
    found = _Found(numbers, s_top == t_top, np.zeros(len(rows), np.uint8))
    slope = None
    if scale is not None:
        excess = alpha * np.where(p < p_rest, p - b, b_rest - p_rest)
        hard = (ce_weight or 0.0) * ce_rest
        of_student = temperature * (of_others - excess)
        if temperature == 1:
            of_student = of_student + hard
        slope = s_others.mul_(_column(scale * of_student / s_rest))
        slope.addcmul_(t_others, _column(-scale * temperature * of_others / t_rest))
        if ce_weight and temperature != 1:
            slope.addcmul_(hard_others, _column(scale * hard / hard_rest))
        slope.numpy()[rows, targets] = scale * (temperature * excess - hard)
    # Rows with a masked target or a fault, or with gaps too wide for the short cuts.
    small = (widest < _WIDEST_ODDS) & np.isfinite(tckd + nckd + ce)
    if temperature != 1:
        largest = np.maximum(abs(student.numpy()[rows, s_top]), abs(teacher.numpy()[rows, t_top]))
        small &= largest < _LARGEST_QUOTIENT * temperature
    if not small.all():
        wide = torch.from_numpy(~small)
        exact, of_wide = rows_by_autograd(
            student[wide], teacher[wide], torch.from_numpy(targets[~small]), weights, scale
        )
        found.numbers[:, ~small] = torch.stack(exact[:5]).numpy()
        found.agrees[~small], found.fault[~small] = exact.agrees.numpy(), exact.fault.numpy()
        if slope is not None and of_wide is not None:
            slope[wide] = of_wide
    return found, slope


def _divided(
    logits: Tensor, rows: NDArray[Any], targets: NDArray[Any], temperature: float, others: Tensor
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The mass of the non-target classes, up to a factor, and the log-odds of the target, (R,) each.

    `others` (R, C) receives the probabilities of the other classes up to the same factor, by which torch's sum over a
    large vocabulary is off; 0 for the target. Ratios are free of it.
    """
    if temperature != 1:
        logits = torch.div(logits, temperature, out=others)
    torch.softmax(logits, 1, out=others)
    masses = others.numpy()
    target = masses[rows, targets]
    masses[rows, targets] = 0.0
    rest = np.maximum(others.sum(1).numpy(), _LEAST_MASS)
    return rest, np.log(np.maximum(target, _LEAST_MASS)) - np.log(rest)


def _log_probabilities(odds: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of the target and of the rest, from its log-odds."""
    soft = np.log1p(np.exp(-abs(odds)))
    return np.minimum(odds, 0) - soft, np.minimum(-odds, 0) - soft


def _column(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values).unsqueeze(1)
