"""The pass over rows on a CPU, a block of rows at a time: see `row_pass`.

Blocks are small enough for a cache that is shared by the cores: memory is read and written once, and nothing of the
size of the logits exists but the gradient. What there is one number of for each row is computed by NumPy, whose
operations on few numbers cost less than torch's.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .row_definition import rows_by_definition
from .row_terms import RowTerms, Weights, kinds_of_terms, terms_dtype

_Array = NDArray[Any]

# Of one of the four arrays of a block. Smaller blocks fit the cores' own caches, but are more calls, and were slower.
_BLOCK_BYTES = 2**22
# Elements from which torch shares an operation out to threads; below, NumPy's cost less.
_SHARED_OUT = 2**15
# Of the target against the rest: beyond, the smaller of the two has few digits left in float32.
_WIDEST_ODDS = 60.0
# The logarithm of a mass of 0 would be a warning; of this one it marks the row as wide.
_LEAST_MASS = 1e-37
# Of a row's largest logit and T, whose quotient is rounded: beyond, the row is first brought down to 0.
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
    memory = torch.empty(4, size, classes, dtype=dtype, device="cpu").numpy()
    factor = None if gradient is None else float(scale)
    # Into memory in use a block writes its gradient at once; into new memory of many, time varied less with a copy.
    at_once = False
    if gradient is not None and gradient.dtype == dtype and chosen is None:
        at_once = count == size or gradient.data_ptr() == student.data_ptr()
    found = []
    for start in range(0, count, size):
        end = min(start + size, count)
        at = slice(start, end) if chosen is None else chosen[start:end]
        room = memory[:, : end - start]
        slope = gradient.numpy()[at] if gradient is not None and at_once else room[0]
        pair = [_array(logits, at, dtype) for logits in (student, teacher)]
        found.append(_block(pair[0], pair[1], targets[at], weights, factor, room, slope))
        if gradient is not None and not at_once:
            _write(gradient, at, slope)
    if not found:
        return RowTerms(*(labels.new_zeros(len(targets), dtype=kind) for kind in kinds_of_terms(dtype)))
    numbers, agrees, fault = (
        found[0] if len(found) == 1 else (np.concatenate(parts, -1) for parts in zip(*found, strict=True))
    )
    if chosen is not None:
        numbers, agrees, fault = (_among(len(targets), chosen, values) for values in (numbers, agrees, fault))
    return RowTerms(*(torch.from_numpy(values) for values in (*numbers, agrees, fault)))


def _array(logits: Tensor, rows: Any, dtype: torch.dtype) -> _Array:
    return logits[_index(rows)].to(dtype).resolve_neg().numpy()


def _index(rows: Any) -> Any:
    return rows if isinstance(rows, slice) else torch.from_numpy(rows)


def _write(gradient: Tensor, rows: Any, slope: _Array) -> None:
    made = torch.from_numpy(slope)
    if gradient.dtype == made.dtype:
        # NumPy writes new memory page after page. Torch does from many places at once, which takes up to ten times as
        # long.
        gradient.numpy()[rows] = slope
        return
    gradient[_index(rows)] = made.to(gradient.dtype)


def _among(number: int, chosen: _Array, values: _Array) -> _Array:
    """`values` (..., R) at the chosen places among `number`, 0 elsewhere."""
    whole = np.zeros((*values.shape[:-1], number), values.dtype)
    whole[..., chosen] = values
    return whole


class _Found(NamedTuple):
    """`RowTerms` as arrays."""

    numbers: _Array
    """(5, R): ce, tckd, nckd, second, dkd."""
    agrees: NDArray[np.bool_]
    fault: NDArray[np.uint8]


class _Odds(NamedTuple):
    """The target against the rest in one model's distribution, (R,) each."""

    log_odds: _Array
    p: _Array
    p_rest: _Array
    log_p: _Array
    log_p_rest: _Array
    others: _Array
    """(R, C), probabilities of the other classes up to a factor, 0 for the target."""
    rest: _Array
    """Their sum, of which ratios are free of the factor."""


# What is not finite is found below, and what is too small to count is 0.
@np.errstate(all="ignore")
def _block(
    student: _Array,
    teacher: _Array,
    targets: _Array,
    weights: Weights,
    scale: float | None,
    memory: _Array,
    slope: _Array,
) -> _Found:
    """The terms of a block of rows; with a scale the gradient (R, C) times it goes to `slope`.

    `slope` may be the memory of the student's logits, or `memory[0]`.
    """
    rows, temperature = np.arange(len(targets)), weights.temperature
    s_given, t_given = student, teacher
    if temperature != 1:
        student, teacher = _divisible(student, temperature), _divisible(teacher, temperature)
    s = _odds(student, rows, targets, temperature, memory[0])
    t = _odds(teacher, rows, targets, temperature, memory[1])
    hard = s
    if weights.ce_weight is not None and temperature != 1:
        hard = _odds(student, rows, targets, 1.0, memory[3])
    numbers = _terms(s, t, hard, *_gaps(student, teacher, t.others, rows, targets, memory[2]), weights)
    found = _Found(numbers, s_given.argmax(1) == t_given.argmax(1), np.zeros(len(rows), np.uint8))
    # Others have a masked target or a fault, or gaps too wide for the short cuts.
    widest = np.maximum(np.maximum(abs(s.log_odds), abs(t.log_odds)), abs(hard.log_odds))
    narrow = (widest < _WIDEST_ODDS) & np.isfinite(numbers[4] + numbers[0])
    exact = None
    if not narrow.all():
        s_wide, t_wide, labels = (torch.from_numpy(values[~narrow]) for values in (s_given, t_given, targets))
        exact = rows_by_definition(s_wide, t_wide, labels, weights, scale)
    if scale is not None:
        _write_slope(slope, s, t, hard, rows, targets, weights, scale)
    if exact is not None:
        terms, of_wide = exact
        numbers[:, ~narrow] = torch.stack(terms[:5]).numpy()
        found.agrees[~narrow], found.fault[~narrow] = terms.agrees.numpy(), terms.fault.numpy()
        if of_wide is not None:
            slope[~narrow] = of_wide.numpy()
    return found


def _divisible(logits: _Array, temperature: float) -> _Array:
    """`logits` (R, C), less each row's largest if some of these are too large to be divided by the temperature."""
    peaks = torch.from_numpy(logits).amax(1, keepdim=True).numpy()
    return logits - peaks if (abs(peaks) >= _LARGEST_QUOTIENT * temperature).any() else logits


def _odds(logits: _Array, rows: _Array, targets: _Array, temperature: float, others: _Array) -> _Odds:
    """The target's odds in the softmax of a model at a temperature; `others` (R, C) is memory for the probabilities.

    Torch's sum over a large vocabulary is off by a factor, which all probabilities of a row then have in common.
    """
    if temperature != 1:
        _elementwise("divide", logits, temperature, out=others)
        logits = others
    probabilities = torch.from_numpy(others)
    torch.softmax(torch.from_numpy(logits), 1, out=probabilities)
    target = others[rows, targets]
    others[rows, targets] = 0.0
    rest = np.maximum(probabilities.sum(1).numpy(), _LEAST_MASS)
    log_odds = np.log(np.maximum(target, _LEAST_MASS)) - np.log(rest)
    # None of these is a difference of probabilities, so that all keep their digits.
    soft = np.log1p(np.exp(-abs(log_odds)))
    log_p, log_p_rest = np.minimum(log_odds, 0) - soft, np.minimum(-log_odds, 0) - soft
    return _Odds(log_odds, np.exp(log_p), np.exp(log_p_rest), log_p, log_p_rest, others, rest)


def _gaps(
    student: _Array, teacher: _Array, shares: _Array, rows: _Array, targets: _Array, gaps: _Array
) -> tuple[_Array, _Array]:
    """The teacher's logits less the student's, (R,) each: the sum weighted by `shares` (R, C), and the target's.

    `gaps` (R, C) is memory to use.
    """
    _elementwise("subtract", teacher, student, out=gaps)
    of_target = gaps[rows, targets]
    _elementwise("multiply", gaps, shares, out=gaps)
    weighted = torch.from_numpy(gaps)
    total = weighted.sum(1).numpy()
    if not np.isfinite(total).all():
        # A class that the teacher masks is at an infinite distance, which counts for nothing.
        weighted.masked_fill_(torch.from_numpy(teacher) == -torch.inf, 0.0)
        total = weighted.sum(1).nan_to_num_(torch.nan, torch.nan, torch.nan).numpy()
        of_target = np.where(np.isfinite(of_target), of_target, np.nan)
    return total, of_target


def _terms(s: _Odds, t: _Odds, hard: _Odds, gap: _Array, target_gap: _Array, weights: Weights) -> _Array:
    """ce, tckd, nckd, second and dkd of each row, (5, R)."""
    alpha, beta, temperature, ce_weight, classical = weights
    numbers = np.zeros((5, len(gap)), gap.dtype)
    tckd = t.p * (t.log_p - s.log_p) + t.p_rest * (t.log_p_rest - s.log_p_rest)
    nckd = (gap / t.rest - target_gap) / temperature + (t.log_odds - s.log_odds)
    numbers[1], numbers[2] = tckd, nckd
    numbers[4] = temperature**2 * (alpha * tckd + (alpha * t.p_rest if classical else beta) * nckd)
    if ce_weight is not None:
        numbers[0] = -hard.log_p
    return numbers


def _write_slope(
    slope: _Array, s: _Odds, t: _Odds, hard: _Odds, rows: _Array, targets: _Array, weights: Weights, scale: float
) -> None:
    """The gradient (R, C) of each row's loss with respect to the student's logits, times `scale`."""
    alpha, beta, temperature, ce_weight, classical = weights
    excess = alpha * np.where(s.p < s.p_rest, s.p - t.p, t.p_rest - s.p_rest)  # α(p − b)
    of_others = alpha * t.p_rest if classical else beta
    of_hard = (ce_weight or 0.0) * hard.p_rest
    of_student = temperature * (of_others - excess)
    if hard is s:
        of_student = of_student + of_hard
    out = torch.from_numpy(slope)
    torch.mul(torch.from_numpy(s.others), _column(scale * of_student / s.rest), out=out)
    out.addcmul_(torch.from_numpy(t.others), _column(-scale * temperature * of_others / t.rest))
    if ce_weight and hard is not s:
        out.addcmul_(torch.from_numpy(hard.others), _column(scale * of_hard / hard.rest))
    slope[rows, targets] = scale * (temperature * excess - of_hard)


def _elementwise(operation: str, left: _Array, right: _Array | float, out: _Array) -> None:
    """`out` = `operation` of the two, by whichever library is faster at it."""
    if out.size < _SHARED_OUT:
        getattr(np, operation)(left, right, out=out)
        return
    tensors = [torch.from_numpy(one) if isinstance(one, np.ndarray) else one for one in (left, right)]
    getattr(torch, operation)(*tensors, out=torch.from_numpy(out))


def _column(values: _Array) -> Tensor:
    return torch.from_numpy(values[:, np.newaxis])
