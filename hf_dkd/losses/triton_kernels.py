"""The loss of each row and its gradient in one pass over the logits, as Triton kernels for GPUs.

The formulas are those of `decoupled.py` with the gradient derived by hand. One program computes one row. It reads
both models' logits once, in blocks, and keeps for each lane (position in a block) running maxima and what was summed
below them, so that nothing is reduced over the row before its end (online softmax: Milakov and Gimelshein 2018, arXiv
1805.02867). The gradient is written block by block from the last to the first: the last block is still in registers,
the ones before it are the likeliest to be in the cache. Rows of up to `ONE_BLOCK` classes never leave the registers.

Imports Triton, which hf_dkd does not require: import this module only where it is installed. With TRITON_INTERPRET=1
in the environment the kernels run on a CPU, slowly.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_BLOCK = 16384
"""Rows of up to this many classes are one block: 16 logits of each model for each of 1,024 threads."""
BLOCK = 4096
"""Classes in a block of longer rows: few enough that a thread's running terms stay in its registers."""
SCALED_BLOCK = 4096


class RowTerms(NamedTuple):
    """What the pass finds for each row, (N,) each, float32; no gradient. Rows labelled ignore_index: 0, False."""

    ce: Tensor
    """Cross-entropy of the student at the label, T = 1; 0 where ce_weight is 0."""
    tckd: Tensor
    """The divergences at temperature T, without T²."""
    nckd: Tensor
    dkd: Tensor
    """T²·(α·TCKD + β·NCKD), or with `classical` T²·α·KL. A weight of 0 removes its term even if that is infinite."""
    agrees: Tensor
    """Booleans: the argmaxes of student and teacher are the same class; the first index wins ties."""
    fault: Tensor
    """uint8. 1: the teacher's row cannot be used (NaN or +inf, or no finite non-target logit). 2: the student masks
    (-inf) a class to which the teacher gives mass. 0: neither. The other terms of a faulty row mean nothing."""


def row_pass(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    ce_weight: float = 0.0,
    classical: bool = False,
    scale: float | Tensor = 1.0,
    ignore_index: int = -100,
    gradient: Tensor | None = None,
) -> RowTerms:
    """The terms of each row, and the gradient of scale·(ce_weight·CE + DKD), computed in float32.

    Args:
        student: (N, C), float32, bfloat16 or float16, C ≥ 2; the last dimension contiguous, any stride between rows.
        teacher: (N, C), as `student`; the dtypes may differ.
        labels: (N,) int64, in [0, C) or `ignore_index`. Any other label makes its row NaN.
        alpha, beta, temperature, ce_weight: the weights of TCKD, NCKD and CE, and T > 0.
        classical: T²·α·KL(teacher ‖ student) in place of DKD; `beta` is not read.
        scale: a number, or a 0-dim tensor on the logits' device, which the host does not read.
        gradient: (N, C), the student's dtype, where the gradient is written, zeros in ignored rows; it may be the
            student's own memory. None: no gradient is computed.
    """
    (N, C), device = student.shape, student.device
    terms = torch.empty(4, N, dtype=torch.float32, device=device)
    flags = torch.empty(2, N, dtype=torch.uint8, device=device)
    strides = [0 if logits is None else logits.stride(0) for logits in (student, teacher, gradient)]
    block = triton.next_power_of_2(C) if C <= ONE_BLOCK else BLOCK
    if N:
        # Triton launches on the current device, which need not be that of the logits.
        with torch.cuda.device_of(student):
            _row_kernel[(N,)](
                student, teacher, labels, gradient, terms, flags, scale, N, *strides, float(alpha), float(beta),
                float(temperature), float(ce_weight), ignore_index, C=C, BLOCK=block,
                ALIGNED=math.gcd(16, *strides), CLASSICAL=classical, WITH_CE=ce_weight != 0,
                T_IS_1=temperature == 1, SCALE_ON_DEVICE=isinstance(scale, Tensor), num_warps=_warps(block, C),
            )  # fmt: skip
    agrees, fault = flags
    return RowTerms(*terms, agrees.view(torch.bool), fault)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply `gradient` (N, C) in place by `factor`, a 0-dim tensor on its device, which the host does not read.

    Where the factor is 1, the usual one of a loss, no logit-sized memory is touched.
    """
    N, C = gradient.shape
    if N:
        with torch.cuda.device_of(gradient):
            stride = gradient.stride(0)
            _scale_kernel[(N, triton.cdiv(C, SCALED_BLOCK))](
                gradient, factor, stride, C=C, BLOCK=min(triton.next_power_of_2(C), SCALED_BLOCK),
                ALIGNED=math.gcd(16, stride),
            )  # fmt: skip


def _warps(block: int, C: int) -> int:
    """Warps of 32 threads: 16 logits for a thread of a row in one block, 8 where running terms take room as well."""
    return max(1, min(32, block // (512 if C <= block else 256)))


@triton.jit
def _row_kernel(
    student, teacher, labels, gradient, terms, flags, scale, N, student_stride, teacher_stride, gradient_stride,
    alpha, beta, T, ce_weight, ignore_index, C: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    CLASSICAL: tl.constexpr, WITH_CE: tl.constexpr, T_IS_1: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """`row_pass` of one row; `terms` (4, N) and `flags` (2, N) are the fields of `RowTerms` in order.

    `s` and `t` are a block of logits, -inf at the target. Of each lane, and then of the row: `top_s` and `top_t` are
    the maxima; `sum_s` = Σ exp(s'), s' = (s − top_s)/T, and `sum_t` likewise; `sum_1` = Σ exp(s − top_s); `cross` =
    Σ exp(t')·(t' − s').
    """
    row = tl.program_id(0).to(tl.int64)  # a row times its stride can exceed 32 bits
    student = _row_start(student, row, student_stride, ALIGNED)
    teacher = _row_start(teacher, row, teacher_stride, ALIGNED)
    if gradient is not None:
        gradient = _row_start(gradient, row, gradient_stride, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    if label == ignore_index:
        _store_terms(terms, flags, row, N, 0.0, 0.0, 0.0, 0.0, 0, 0)
        if gradient is not None:
            for start in range(0, C, BLOCK):
                tl.store(gradient + start + lanes, tl.zeros([BLOCK], tl.float32), mask=start + lanes < C)
        return

    label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
    target_s, target_t = _load_target(student, label), _load_target(teacher, label)
    inverse_T = 1 / T
    s, t = _load_others(student, lanes, label, C, ""), _load_others(teacher, lanes, label, C, "")
    masked = _masks_mass(s, t)
    top_s, first_s, sum_s = s, lanes, _counted(s)
    top_t, first_t, sum_t = t, lanes, _counted(t)
    sum_1, cross = sum_s, tl.zeros([BLOCK], tl.float32)
    for start in range(BLOCK, C, BLOCK):
        columns = start + lanes
        s, t = _load_others(student, columns, label, C, ""), _load_others(teacher, columns, label, C, "")
        masked = masked | _masks_mass(s, t)
        first_s, first_t = tl.where(s > top_s, columns, first_s), tl.where(t > top_t, columns, first_t)
        new_s, new_t = tl.maximum(top_s, s), tl.maximum(top_t, t)
        keeps, joins = _rescaled(top_t, t, inverse_T)
        cross = _times(keeps, cross + _times(sum_t, _gap(top_t, new_t, top_s, new_s) * inverse_T))
        cross += _times(joins, _gap(t, new_t, s, new_s) * inverse_T)
        sum_t = sum_t * keeps + joins
        keeps, joins = _rescaled(top_s, s, inverse_T)
        sum_s = sum_s * keeps + joins
        if WITH_CE and not T_IS_1:
            keeps, joins = _rescaled(top_s, s, 1.0)
            sum_1 = sum_1 * keeps + joins
        top_s, top_t = new_s, new_t

    # The lanes' terms become the row's.
    lane_s, lane_t, top_s, top_t = top_s, top_t, tl.max(top_s, 0), tl.max(top_t, 0)
    agrees = _argmax(lane_s, top_s, first_s, target_s, label, C) == _argmax(
        lane_t, top_t, first_t, target_t, label, C
    )
    weights = _exp_below(lane_t, top_t, inverse_T)
    cross = tl.sum(_times(weights, cross + _times(sum_t, _gap(lane_t, top_t, lane_s, top_s) * inverse_T)), 0)
    sum_t = tl.sum(sum_t * weights, 0)
    sum_s = tl.sum(sum_s * _exp_below(lane_s, top_s, inverse_T), 0)
    odds_s = (target_s - top_s) * inverse_T - tl.log(sum_s)
    odds_t = (target_t - top_t) * inverse_T - tl.log(sum_t)
    odds_1 = odds_s
    if WITH_CE and not T_IS_1:
        sum_1 = tl.sum(sum_1 * _exp_below(lane_s, top_s, 1.0), 0)
        odds_1 = target_s - top_s - tl.log(sum_1)

    p, p_rest = _sigmoids(odds_s)
    b, b_rest = _sigmoids(odds_t)
    if CLASSICAL:
        beta = alpha * b_rest
    tckd = _times(b, _log_sigmoid(odds_t) - _log_sigmoid(odds_s))
    tckd += _times(b_rest, _log_sigmoid(-odds_t) - _log_sigmoid(-odds_s))
    nckd = cross / sum_t - tl.log(sum_t) + tl.log(sum_s)
    dkd = T * T * (_times(alpha, tckd) + _times(beta, nckd))
    ce = 0.0
    if WITH_CE:
        ce = -_log_sigmoid(odds_1)
    # Comparisons with NaN are false. A finite sum is 1 at least, of the maximum.
    usable = (sum_t >= 1) & (top_t < float("inf")) & (target_t < float("inf"))
    masked = (tl.max(masked.to(tl.int32), 0) > 0) | _masks_mass(target_s, target_t)
    _store_terms(terms, flags, row, N, ce, tckd, nckd, dkd, agrees, tl.where(usable, tl.where(masked, 2, 0), 1))

    if gradient is not None:
        if SCALE_ON_DEVICE:
            scale = tl.load(scale).to(tl.float32)
        excess = tl.where(p < p_rest, p - b, b_rest - p_rest)  # p − b, from the two numbers that keep its digits
        at_target = alpha * T * excess
        of_q_s = -at_target
        of_e_1 = 0.0
        if WITH_CE:
            p, p_rest = _sigmoids(odds_1)
            at_target -= ce_weight * p_rest
            if T_IS_1:
                of_q_s += ce_weight * p_rest
            else:
                of_e_1 = scale * ce_weight * p_rest / sum_1
        # Elsewhere: of_gap·(q_s − q_t) + of_q_s·q_s + of_e_1·exp(s − top_s).
        at_target, of_gap, of_q_s = scale * at_target, scale * beta * T, scale * of_q_s
        share_s, share_t = 1 / sum_s, 1 / sum_t
        LAST: tl.constexpr = (C - 1) // BLOCK * BLOCK
        for start in range(LAST, -1, -BLOCK):
            columns = start + lanes
            if start < LAST:
                s = _load_others(student, columns, label, C, "evict_first")
                t = _load_others(teacher, columns, label, C, "evict_first")
            q_s, q_t = share_s * _exp_below(s, top_s, inverse_T), share_t * _exp_below(t, top_t, inverse_T)
            slope = of_gap * (q_s - q_t) + of_q_s * q_s
            if WITH_CE and not T_IS_1:
                slope += of_e_1 * _exp_below(s, top_s, 1.0)
            slope = tl.where(columns == label, at_target, slope)
            tl.store(gradient + columns, slope, mask=columns < C, eviction_policy="evict_first")


@triton.jit
def _scale_kernel(gradient, factor, stride, C: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """`scale_gradient_` of one block of one row."""
    factor = tl.load(factor).to(tl.float32)
    if factor == 1:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = _row_start(gradient, tl.program_id(0).to(tl.int64), stride, ALIGNED) + columns
    tl.store(at, factor * tl.load(at, mask=columns < C).to(tl.float32), mask=columns < C)


@triton.jit
def _row_start(logits, row, stride, ALIGNED: tl.constexpr):
    """A pointer to the row; that its offset is a multiple of ALIGNED lets a thread move 16 bytes at once."""
    return logits + tl.multiple_of(row * stride, ALIGNED)


@triton.jit
def _load_others(row, columns, label, C: tl.constexpr, EVICTION: tl.constexpr):
    """Logits in float32, -inf at the target and past the end."""
    logits = tl.load(row + columns, mask=columns < C, other=-float("inf"), eviction_policy=EVICTION).to(tl.float32)
    return tl.where(columns == label, -float("inf"), logits)


@triton.jit
def _load_target(row, label):
    """The target's logit in float32; NaN where it is +inf or the label is not a class."""
    logit = tl.load(row + label, mask=label >= 0, other=float("nan")).to(tl.float32)
    return tl.where(logit == float("inf"), float("nan"), logit)


@triton.jit
def _masks_mass(s, t):
    """Where the student masks a class to which the teacher gives mass."""
    return (s == -float("inf")) & (t > -float("inf"))


@triton.jit
def _counted(logits):
    """exp(logits − logits): 1, but 0 of masked classes."""
    return tl.where(logits == -float("inf"), 0.0, 1.0)


@triton.jit
def _times(weights, values):
    """The product, 0 where the weight is 0 even if the value is infinite or NaN."""
    return tl.where(weights == 0, 0.0, weights * values)


@triton.jit
def _gap(t, top_t, s, top_s):
    """T·(t' − s')."""
    return (t - top_t) - (s - top_s)


@triton.jit
def _exp_below(logits, top, inverse_T):
    """exp((logits − top)/T), 0 where every class is masked."""
    return tl.exp((logits - tl.where(top == -float("inf"), 0.0, top)) * inverse_T)


@triton.jit
def _rescaled(top, logits, inverse_T):
    """Below the new maximum: the factor of a sum of exponentials below `top`, and exp((logits − the new maximum)/T).

    One of the two is 1, so that one exponential gives both.
    """
    smaller = tl.exp(-tl.abs(logits - top) * inverse_T)
    rises = logits > top
    joins = tl.where(rises, 1.0, tl.where(logits == -float("inf"), 0.0, smaller))
    return tl.where(rises, smaller, 1.0), joins


@triton.jit
def _argmax(lanes, top, first, target, label, C: tl.constexpr):
    """The first class with the row's largest logit, from the lanes' maxima, where these are, and the target."""
    other = tl.min(tl.where(lanes == top, first, C), 0)
    return tl.where((target > top) | ((target == top) & (label < other)), label, other)


@triton.jit
def _sigmoids(odds):
    """sigmoid(odds) and 1 − sigmoid(odds), both to the last digits."""
    e = tl.exp(-tl.abs(odds))
    larger = 1 / (1 + e)
    return tl.where(odds < 0, e * larger, larger), tl.where(odds < 0, larger, e * larger)


@triton.jit
def _log_sigmoid(odds):
    """min(odds, 0) − log1p(exp(−|odds|)); log1p after Kahan, whose quotient cancels the rounding of 1 + e."""
    e = tl.exp(-tl.abs(odds))
    rounded = 1 + e
    log1p = tl.where(rounded == 1, e, tl.log(rounded) * (e / tl.where(rounded == 1, 1.0, rounded - 1)))
    return tl.minimum(odds, 0.0) - log1p


@triton.jit
def _store_terms(terms, flags, row, N, ce, tckd, nckd, dkd, agrees, fault):
    """One row of the fields of `RowTerms`."""
    terms += row
    flags += row
    tl.store(terms, ce)
    tl.store(terms + N, tckd)
    tl.store(terms + 2 * N, nckd)
    tl.store(terms + 3 * N, dkd)
    tl.store(flags, agrees)
    tl.store(flags + N, fault)
