"""The loss of each row and its gradient in one pass over the logits, as Triton kernels for GPUs.

The formulas are those of `decoupled.py` with the gradient derived by hand. One program computes one row, in blocks
whose classes are shared out to lanes, a few neighbours to each: the 16 bytes that a thread loads at once. A lane keeps
its own maxima and what it summed below them, so that threads meet only at the row's end (online softmax: Milakov and
Gimelshein 2018, arXiv 1805.02867). The gradient is then written from the last block, still in registers, to the first:
what was read last is the likeliest to be in a cache. Rows of up to `ONE_BLOCK` classes are read once.

Imports Triton, which hf_dkd does not require: import this module only where it is installed. With TRITON_INTERPRET=1
in the environment the kernels run on a CPU, slowly.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_BLOCK = 4096
"""Rows of up to this many classes are one block: four lanes to a thread."""
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
    per_lane = 16 // max(student.element_size(), teacher.element_size())
    lanes, warps = _lanes_and_warps(C, per_lane)
    if N:
        # Triton launches on the current device, which need not be that of the logits.
        with torch.cuda.device_of(student):
            _row_kernel[(N,)](
                student, teacher, labels, gradient, terms, flags, scale, N, *strides, float(alpha), float(beta),
                float(temperature), float(ce_weight), ignore_index, C=C, LANES=lanes, PER_LANE=per_lane,
                ALIGNED=math.gcd(16, *strides), CLASSICAL=classical, WITH_CE=ce_weight != 0,
                T_IS_1=temperature == 1, SCALE_ON_DEVICE=isinstance(scale, Tensor), num_warps=warps,
            )  # fmt: skip
    agrees, fault = flags
    return RowTerms(*terms, agrees.view(torch.bool), fault)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply `gradient` (N, C) in place by `factor`, a 0-dim tensor on its device, which the host does not read.

    Where the factor is 1, as it usually is, the gradient's memory is not touched.
    """
    (N, C), stride = gradient.shape, gradient.stride(0)
    if N:
        with torch.cuda.device_of(gradient):
            block = min(triton.next_power_of_2(C), SCALED_BLOCK)
            _scale_kernel[(N, triton.cdiv(C, block))](
                gradient, factor, stride, C=C, BLOCK=block, ALIGNED=math.gcd(16, stride)
            )


def _lanes_and_warps(C: int, per_lane: int) -> tuple[int, int]:
    """Lanes in a block, and warps of 32 threads.

    Every warp repeats the arithmetic of the row as a whole, so that short rows want few; of long rows few are to be
    under way at a time, so that a cache still holds them for the second look.
    """
    if C <= ONE_BLOCK:
        block = triton.next_power_of_2(C)
        return max(block // per_lane, 32), max(block // per_lane // 128, 1)
    warps = 4 if C <= 16384 else 8 if C <= 65536 else 16
    return warps * 32 * 8 // per_lane, warps


@triton.jit
def _row_kernel(
    student, teacher, labels, gradient, terms, flags, scale, N, student_stride, teacher_stride, gradient_stride,
    alpha, beta, T, ce_weight, ignore_index, C: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr,
    ALIGNED: tl.constexpr, CLASSICAL: tl.constexpr, WITH_CE: tl.constexpr, T_IS_1: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """`row_pass` of one row; `terms` (4, N) and `flags` (2, N) are the fields of `RowTerms` in order."""
    row = tl.program_id(0).to(tl.int64)  # a row times its stride can exceed 32 bits
    student = _row_start(student, row, student_stride, ALIGNED)
    teacher = _row_start(teacher, row, teacher_stride, ALIGNED)
    if gradient is not None:
        gradient = _row_start(gradient, row, gradient_stride, ALIGNED)
    BLOCK: tl.constexpr = LANES * PER_LANE
    LAST: tl.constexpr = (C - 1) // BLOCK * BLOCK
    WITH_E_1: tl.constexpr = WITH_CE and not T_IS_1
    lanes = tl.arange(0, LANES) * PER_LANE  # the first column of each
    label = tl.load(labels + row)
    if label == ignore_index:
        _store_terms(terms, flags, row, N, 0.0, 0.0, 0.0, 0.0, 0, 0)
        if gradient is not None:
            for start in range(0, C, BLOCK):
                _store_slope(gradient, start + lanes, tl.zeros([LANES, PER_LANE], tl.float32), 0.0, -1, C)
        return

    label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
    target_s, target_t = _load_target(student, label), _load_target(teacher, label)
    log2_e = 1.4426950408889634
    inverse_T = 1 / T
    rate = inverse_T * log2_e
    nothing, lowest = tl.zeros([LANES], tl.float32), tl.full([LANES], -float("inf"), tl.float32)
    first = tl.zeros([LANES], tl.int32)
    state = lowest, lowest, nothing, nothing, nothing, nothing, lowest, first, first
    state, e_s, e_t, e_1 = _fold(state, student, teacher, lanes, label, rate, C, PER_LANE, WITH_E_1)
    for start in range(BLOCK, C, BLOCK):
        state, e_s, e_t, e_1 = _fold(state, student, teacher, start + lanes, label, rate, C, PER_LANE, WITH_E_1)
    lane_s, lane_t, sum_s, sum_t, sum_1, cross, widest, first_s, first_t = state

    # The lanes' terms become the row's.
    top_s, top_t, widest, _ = _split4(tl.max(_join4(lane_s, lane_t, widest, widest), 0))
    first_s, first_t = tl.where(lane_s == top_s, first_s, C), tl.where(lane_t == top_t, first_t, C)
    first_s, first_t = tl.split(tl.min(tl.join(first_s, first_t), 0))
    best_s = _argmax(student, first_s, top_s, target_s, label, C, PER_LANE)
    best_t = _argmax(teacher, first_t, top_t, target_t, label, C, PER_LANE)
    weight_s, weight_t = _exp2_below(lane_s, top_s, rate), _exp2_below(lane_t, top_t, rate)
    cross = _times(weight_t, cross + _times(sum_t, (lane_t - top_t) - (lane_s - top_s)))
    weight_1 = weight_s
    if WITH_E_1:
        weight_1 = _exp2_below(lane_s, top_s, log2_e)
    sums = _join4(sum_s * weight_s, sum_t * weight_t, sum_1 * weight_1, cross)
    sum_s, sum_t, sum_1, cross = _split4(tl.sum(sums, 0))
    odds_s = (target_s - top_s) * inverse_T - tl.log(sum_s)
    odds_t = (target_t - top_t) * inverse_T - tl.log(sum_t)
    odds_1 = odds_s
    if WITH_E_1:
        odds_1 = target_s - top_s - tl.log(sum_1)

    p, p_rest = _sigmoids(odds_s)
    b, b_rest = _sigmoids(odds_t)
    if CLASSICAL:
        beta = alpha * b_rest
    tckd = _times(b, _log_sigmoid(odds_t) - _log_sigmoid(odds_s))
    tckd += _times(b_rest, _log_sigmoid(-odds_t) - _log_sigmoid(-odds_s))
    nckd = cross / sum_t * inverse_T - tl.log(sum_t) + tl.log(sum_s)
    dkd = T * T * (_times(alpha, tckd) + _times(beta, nckd))
    ce = 0.0
    if WITH_CE:
        ce = -_log_sigmoid(odds_1)
    # Comparisons with NaN are false. A finite sum is 1 at least, of the maximum.
    usable = (sum_t >= 1) & (top_t < float("inf")) & (target_t < float("inf"))
    masked = _masks_mass(target_s, target_t).to(tl.int32)
    if widest == float("inf"):
        for start in range(0, C, BLOCK):
            s = _load_others(student, start + lanes, label, C, PER_LANE)
            t = _load_others(teacher, start + lanes, label, C, PER_LANE)
            masked = masked | tl.max(tl.max(_masks_mass(s, t).to(tl.int32), 1), 0)
    fault = tl.where(usable, 2 * masked, 1)
    _store_terms(terms, flags, row, N, ce, tckd, nckd, dkd, best_s == best_t, fault)

    if gradient is not None:
        if SCALE_ON_DEVICE:
            scale = tl.load(scale).to(tl.float32)
        excess = tl.where(p < p_rest, p - b, b_rest - p_rest)  # p − b, from the two numbers that keep its digits
        at_target = alpha * T * excess
        of_s = -at_target
        share_1 = 0.0
        if WITH_CE:
            p, p_rest = _sigmoids(odds_1)
            at_target -= ce_weight * p_rest
            if WITH_E_1:
                share_1 = scale * ce_weight * p_rest / sum_1
            else:
                of_s += ce_weight * p_rest
        at_target, of_gap, of_s = scale * at_target, scale * beta * T, scale * of_s
        share_s, share_t = 1 / sum_s, 1 / sum_t
        tl.debug_barrier()  # the gradient may be the student's memory, and nobody writes before all have read
        q_s, q_t = e_s * (weight_s * share_s)[:, None], e_t * (weight_t * share_t)[:, None]
        slope = of_gap * (q_s - q_t) + of_s * q_s
        if WITH_E_1:
            slope += e_1 * (weight_1 * share_1)[:, None]
        _store_slope(gradient, LAST + lanes, slope, at_target, label, C)
        for behind in range(BLOCK, LAST + 1, BLOCK):
            now = LAST - behind + lanes
            s, t = _load(student, now, C, PER_LANE), _load(teacher, now, C, PER_LANE)
            q_s, q_t = _exp2_below(s, top_s, rate) * share_s, _exp2_below(t, top_t, rate) * share_t
            slope = of_gap * (q_s - q_t) + of_s * q_s
            if WITH_E_1:
                slope += _exp2_below(s, top_s, log2_e) * share_1
            _store_slope(gradient, now, slope, at_target, label, C)


@triton.jit
def _fold(
    state, student, teacher, lanes, label, rate, C: tl.constexpr, PER_LANE: tl.constexpr, WITH_E_1: tl.constexpr
):  # fmt: skip
    """One block more in the lanes' terms; also the block's exponentials below the lanes' maxima.

    The state, (LANES,) each: `top_s` and `top_t`, the largest logits; `sum_s` = Σ exp((s − top_s)/T) and `sum_t`;
    `sum_1` = Σ exp(s − top_s); `cross` = Σ exp((t − top_t)/T)·gap, gap = (t − top_t) − (s − top_s); `widest`, +inf if
    any gap was; `first_s` and `first_t`, the first column of the block's lane where the maximum was found.
    """
    top_s, top_t, sum_s, sum_t, sum_1, cross, widest, first_s, first_t = state
    s, t = _load_others(student, lanes, label, C, PER_LANE), _load_others(teacher, lanes, label, C, PER_LANE)
    new_s, new_t = tl.max(s, 1), tl.max(t, 1)
    first_s, first_t = tl.where(new_s > top_s, lanes, first_s), tl.where(new_t > top_t, lanes, first_t)
    new_s, new_t = tl.maximum(new_s, top_s), tl.maximum(new_t, top_t)
    # Of a lane with nothing but -inf so far, the exponentials are to be 0.
    base_s, base_t = tl.where(new_s == -float("inf"), 0.0, new_s), tl.where(new_t == -float("inf"), 0.0, new_t)
    falls_s, falls_t = top_s - base_s, top_t - base_t
    keeps_s, keeps_t = tl.exp2(falls_s * rate), tl.exp2(falls_t * rate)
    s, t = s - base_s[:, None], t - base_t[:, None]
    e_s, e_t, gap = tl.exp2(s * rate), tl.exp2(t * rate), t - s
    cross = _times(keeps_t, cross + _times(sum_t, falls_t - falls_s)) + tl.sum(e_t * tl.where(e_t == 0, 0.0, gap), 1)
    sum_s, sum_t = sum_s * keeps_s + tl.sum(e_s, 1), sum_t * keeps_t + tl.sum(e_t, 1)
    e_1 = e_s
    if WITH_E_1:
        log2_e = 1.4426950408889634
        e_1 = tl.exp2(s * log2_e)
        sum_1 = sum_1 * tl.exp2(falls_s * log2_e) + tl.sum(e_1, 1)
    widest = tl.maximum(widest, tl.max(gap, 1))
    return (new_s, new_t, sum_s, sum_t, sum_1, cross, widest, first_s, first_t), e_s, e_t, e_1


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
def _load(row, lanes, C: tl.constexpr, PER_LANE: tl.constexpr):
    """The logits (LANES, PER_LANE) of lanes that begin at these columns, in float32; -inf past the row's end."""
    columns = lanes[:, None] + tl.arange(0, PER_LANE)[None, :]
    return tl.load(row + columns, mask=columns < C, other=-float("inf")).to(tl.float32)


@triton.jit
def _load_others(row, lanes, label, C: tl.constexpr, PER_LANE: tl.constexpr):
    """`_load` with -inf at the target."""
    return tl.where(_is_target(lanes, label, PER_LANE), -float("inf"), _load(row, lanes, C, PER_LANE))


@triton.jit
def _is_target(lanes, label, PER_LANE: tl.constexpr):
    """Booleans (LANES, PER_LANE)."""
    return (label - lanes)[:, None] == tl.arange(0, PER_LANE)[None, :]


@triton.jit
def _load_target(row, label):
    """The target's logit in float32; NaN where it is +inf or the label is not a class."""
    logit = tl.load(row + label, mask=label >= 0, other=float("nan")).to(tl.float32)
    return tl.where(logit == float("inf"), float("nan"), logit)


@triton.jit
def _store_slope(gradient, lanes, slope, at_target, label, C: tl.constexpr):
    """A block of the gradient."""
    columns = lanes[:, None] + tl.arange(0, slope.shape[1])[None, :]
    slope = tl.where(_is_target(lanes, label, slope.shape[1]), at_target, slope)
    tl.store(gradient + columns, slope, mask=columns < C, eviction_policy="evict_first")


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


@triton.jit
def _argmax(row, first, top, target, label, C: tl.constexpr, PER_LANE: tl.constexpr):
    """The first class with the row's largest logit: a look at the lane that begins at `first`, and at the target."""
    columns = first + tl.arange(0, PER_LANE)
    logits = tl.load(row + columns, mask=(columns < C) & (columns != label), other=-float("inf")).to(tl.float32)
    other = tl.min(tl.where(logits == top, columns, C), 0)
    return tl.where((target > top) | ((target == top) & (label < other)), label, other)


@triton.jit
def _masks_mass(s, t):
    """Where the student masks a class to which the teacher gives mass."""
    return (s == -float("inf")) & (t > -float("inf"))


@triton.jit
def _join4(a, b, c, d):
    """Four (LANES,) as one, so that threads meet once to reduce them all."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _split4(reduced):
    """What `_join4` joined, after the lanes were reduced."""
    first, second = tl.split(reduced)
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


@triton.jit
def _times(weights, values):
    """The product, 0 where the weight is 0 even if the value is infinite or NaN."""
    return tl.where(weights == 0, 0.0, weights * values)


@triton.jit
def _exp2_below(logits, top, rate):
    """2^((logits − top)·rate), 0 where every class is masked."""
    return tl.exp2((logits - tl.where(top == -float("inf"), 0.0, top)) * rate)


@triton.jit
def _sigmoids(odds):
    """sigmoid(odds) and 1 − sigmoid(odds), both to the last digits."""
    e = tl.exp(-tl.abs(odds))
    larger = 1 / (1 + e)
    return tl.where(odds < 0, e * larger, larger), tl.where(odds < 0, larger, e * larger)


@triton.jit
def _log_sigmoid(odds):
    """min(odds, 0) − log1p(e), e = exp(−|odds|); what 1 + e lost to rounding is added to its logarithm."""
    e = tl.exp(-tl.abs(odds))
    rounded = 1 + e
    return tl.minimum(odds, 0.0) - (tl.log(rounded) + (e - (rounded - 1)))
