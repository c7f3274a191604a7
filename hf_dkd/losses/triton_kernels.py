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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_terms import RowTerms, Weights
from .triton_arithmetic import (
    LOG2_E,
    argmax,
    exp2_below,
    fold,
    join4,
    load,
    load_others,
    load_target,
    log_sigmoid,
    masks_mass,
    row_start,
    sigmoids,
    split4,
    store_slope,
    store_terms,
    times,
)

ONE_BLOCK = 4096
"""Rows of up to this many classes are one block: four lanes to a thread."""
SCALED_BLOCK = 4096


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
    """`row_pass.row_pass` on a GPU, in float32; the other terms of a row at fault mean nothing.

    Args:
        student: (N, C), float32, bfloat16 or float16, C ≥ 2; the last dimension contiguous, any stride between rows.
        teacher: (N, C), as `student`; the dtypes may differ.
        labels: (N,) int64, in [0, C) or `ignore_index`. Any other label makes its row NaN.
        scale: a number, or a 0-dim tensor on the logits' device, which the host does not read.
        gradient: (N, C), the student's dtype, where the gradient is written, zeros in ignored rows; it may be the
            student's own memory. None: no gradient is computed.
    """
    (N, C), device = student.shape, student.device
    alpha, beta, temperature, ce_weight, classical = weights
    terms = torch.empty(4, N, dtype=torch.float32, device=device)
    flags = torch.empty(2, N, dtype=torch.uint8, device=device)
    strides = [0 if logits is None else logits.stride(0) for logits in (student, teacher, gradient)]
    per_lane = 16 // max(student.element_size(), teacher.element_size())
    lanes, warps = _lanes_and_warps(C, per_lane)
    if N:
        # Triton launches on the current device, which need not be that of the logits.
        with torch.cuda.device_of(student):
            _row_kernel[(N,)](
                student, teacher, labels.contiguous(), gradient, terms, flags, scale, N, *strides,
                float(alpha), float(beta), float(temperature), float(ce_weight or 0.0), ignore_index,
                C=C, LANES=lanes, PER_LANE=per_lane, ALIGNED=math.gcd(16, *strides), CLASSICAL=classical,
                WITH_CE=ce_weight is not None, T_IS_1=temperature == 1, SCALE_ON_DEVICE=isinstance(scale, Tensor),
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    (ce, tckd, nckd, dkd), (agrees, fault) = terms, flags
    return RowTerms(ce, tckd, nckd, torch.zeros_like(nckd), dkd, agrees.view(torch.bool), fault)


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
    student = row_start(student, row, student_stride, ALIGNED)
    teacher = row_start(teacher, row, teacher_stride, ALIGNED)
    if gradient is not None:
        gradient = row_start(gradient, row, gradient_stride, ALIGNED)
    BLOCK: tl.constexpr = LANES * PER_LANE
    WITH_E_1: tl.constexpr = WITH_CE and not T_IS_1
    lanes = tl.arange(0, LANES) * PER_LANE  # the first column of each
    label = tl.load(labels + row)
    if label == ignore_index:
        store_terms(terms, flags, row, N, 0.0, 0.0, 0.0, 0.0, 0, 0)
        if gradient is not None:
            for start in range(0, C, BLOCK):
                store_slope(gradient, start + lanes, tl.zeros([LANES, PER_LANE], tl.float32), 0.0, -1, C)
        return
    label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
    target_s, target_t = load_target(student, label), load_target(teacher, label)
    inverse_T = 1 / T
    rate = inverse_T * LOG2_E
    nothing, lowest = tl.zeros([LANES], tl.float32), tl.full([LANES], -float("inf"), tl.float32)
    first = tl.zeros([LANES], tl.int32)
    state = lowest, lowest, nothing, nothing, nothing, nothing, lowest, first, first
    state, e_s, e_t, e_1 = fold(state, student, teacher, lanes, label, rate, C, PER_LANE, WITH_E_1)
    for start in range(BLOCK, C, BLOCK):
        state, e_s, e_t, e_1 = fold(state, student, teacher, start + lanes, label, rate, C, PER_LANE, WITH_E_1)
    tops, bests, widest, weights, sums, cross = _row_of_lanes(
        state, student, teacher, target_s, target_t, label, rate, C, PER_LANE, WITH_E_1
    )
    top_s, top_t, sum_s, sum_t, sum_1 = tops[0], tops[1], sums[0], sums[1], sums[2]
    odds_s = (target_s - top_s) * inverse_T - tl.log(sum_s)
    odds_t = (target_t - top_t) * inverse_T - tl.log(sum_t)
    odds_1 = odds_s
    if WITH_E_1:
        odds_1 = target_s - top_s - tl.log(sum_1)

    p, p_rest = sigmoids(odds_s)
    b, b_rest = sigmoids(odds_t)
    if CLASSICAL:
        beta = alpha * b_rest
    tckd = times(b, log_sigmoid(odds_t) - log_sigmoid(odds_s))
    tckd += times(b_rest, log_sigmoid(-odds_t) - log_sigmoid(-odds_s))
    nckd = cross / sum_t * inverse_T - tl.log(sum_t) + tl.log(sum_s)
    dkd = T * T * (times(alpha, tckd) + times(beta, nckd))
    ce = 0.0
    if WITH_CE:
        ce = -log_sigmoid(odds_1)
    fault = _fault(student, teacher, lanes, target_s, target_t, label, top_t, sum_t, widest, C, BLOCK, PER_LANE)
    store_terms(terms, flags, row, N, ce, tckd, nckd, dkd, bests[0] == bests[1], fault)

    if gradient is not None:
        if SCALE_ON_DEVICE:
            scale = tl.load(scale).to(tl.float32)
        excess = tl.where(p < p_rest, p - b, b_rest - p_rest)  # p − b, from the two numbers that keep its digits
        at_target = alpha * T * excess
        of_s = -at_target
        of_1 = 0.0
        if WITH_CE:
            p, p_rest = sigmoids(odds_1)
            at_target -= ce_weight * p_rest
            if WITH_E_1:
                of_1 = scale * ce_weight * p_rest
            else:
                of_s += ce_weight * p_rest
        at_target, of_gap, of_s = scale * at_target, scale * beta * T, scale * of_s
        factors = of_gap, of_s, of_1, at_target
        _write_gradient(
            gradient, student, teacher, lanes, label, factors, (e_s, e_t, e_1), weights, tops, sums, rate,
            C, BLOCK, PER_LANE, WITH_E_1,
        )  # fmt: skip


@triton.jit
def _row_of_lanes(
    state, student, teacher, target_s, target_t, label, rate, C: tl.constexpr, PER_LANE: tl.constexpr,
    WITH_E_1: tl.constexpr,
):  # fmt: skip
    """The row's terms, of those of its lanes (see `fold`); the weights (LANES,) that bring a lane to the row's maximum.

    (top_s, top_t), (class of s, class of t), widest, (weight_s, weight_t, weight_1), (sum_s, sum_t, sum_1), cross.
    """
    lane_s, lane_t, sum_s, sum_t, sum_1, cross, widest, first_s, first_t = state
    top_s, top_t, widest, _ = split4(tl.max(join4(lane_s, lane_t, widest, widest), 0))
    first_s, first_t = tl.where(lane_s == top_s, first_s, C), tl.where(lane_t == top_t, first_t, C)
    first_s, first_t = tl.split(tl.min(tl.join(first_s, first_t), 0))
    best_s = argmax(student, first_s, top_s, target_s, label, C, PER_LANE)
    best_t = argmax(teacher, first_t, top_t, target_t, label, C, PER_LANE)
    weight_s, weight_t = exp2_below(lane_s, top_s, rate), exp2_below(lane_t, top_t, rate)
    cross = times(weight_t, cross + times(sum_t, (lane_t - top_t) - (lane_s - top_s)))
    weight_1 = weight_s
    if WITH_E_1:
        weight_1 = exp2_below(lane_s, top_s, LOG2_E)
    sums = join4(sum_s * weight_s, sum_t * weight_t, sum_1 * weight_1, cross)
    sum_s, sum_t, sum_1, cross = split4(tl.sum(sums, 0))
    return (top_s, top_t), (best_s, best_t), widest, (weight_s, weight_t, weight_1), (sum_s, sum_t, sum_1), cross


@triton.jit
def _fault(
    student, teacher, lanes, target_s, target_t, label, top_t, sum_t, widest,
    C: tl.constexpr, BLOCK: tl.constexpr, PER_LANE: tl.constexpr,
):  # fmt: skip
    """`RowTerms.fault` of the row."""
    # Comparisons with NaN are false. A finite sum is 1 at least, of the maximum.
    usable = (sum_t >= 1) & (top_t < float("inf")) & (target_t < float("inf"))
    masked = masks_mass(target_s, target_t).to(tl.int32)
    if widest == float("inf"):
        for start in range(0, C, BLOCK):
            s = load_others(student, start + lanes, label, C, PER_LANE)
            t = load_others(teacher, start + lanes, label, C, PER_LANE)
            masked = masked | tl.max(tl.max(masks_mass(s, t).to(tl.int32), 1), 0)
    return tl.where(usable, 2 * masked, 1)


@triton.jit
def _write_gradient(
    gradient, student, teacher, lanes, label, factors, last, weights, tops, sums, rate,
    C: tl.constexpr, BLOCK: tl.constexpr, PER_LANE: tl.constexpr, WITH_E_1: tl.constexpr,
):  # fmt: skip
    """of_gap·(q_s − q_t) + of_s·q_s + of_1·q_1, at_target at the target; q_1 are the student's q at T = 1.

    Args:
        factors: of_gap, of_s, of_1, at_target.
        last: the exponentials of the row's last block below the lanes' maxima, by T of student and teacher, and at 1.
        weights: what brings them to the row's maxima, `tops`.
        sums: of the row's exponentials.
    """
    of_gap, of_s, of_1, at_target = factors
    e_s, e_t, e_1 = last
    weight_s, weight_t, weight_1 = weights
    top_s, top_t = tops
    LAST: tl.constexpr = (C - 1) // BLOCK * BLOCK
    share_s, share_t, share_1 = 1 / sums[0], 1 / sums[1], of_1 / sums[2]
    tl.debug_barrier()  # the gradient may be the student's memory, and nobody writes before all have read
    q_s, q_t = e_s * (weight_s * share_s)[:, None], e_t * (weight_t * share_t)[:, None]
    slope = of_gap * (q_s - q_t) + of_s * q_s
    if WITH_E_1:
        slope += e_1 * (weight_1 * share_1)[:, None]
    store_slope(gradient, LAST + lanes, slope, at_target, label, C)
    for behind in range(BLOCK, LAST + 1, BLOCK):
        now = LAST - behind + lanes
        s, t = load(student, now, C, PER_LANE), load(teacher, now, C, PER_LANE)
        q_s, q_t = exp2_below(s, top_s, rate) * share_s, exp2_below(t, top_t, rate) * share_t
        slope = of_gap * (q_s - q_t) + of_s * q_s
        if WITH_E_1:
            slope += exp2_below(s, top_s, LOG2_E) * share_1
        store_slope(gradient, now, slope, at_target, label, C)


@triton.jit
def _scale_kernel(gradient, factor, stride, C: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """`scale_gradient_` of one block of one row."""
    factor = tl.load(factor).to(tl.float32)
    if factor == 1:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row_start(gradient, tl.program_id(0).to(tl.int64), stride, ALIGNED) + columns
    tl.store(at, factor * tl.load(at, mask=columns < C).to(tl.float32), mask=columns < C)
