"""The arithmetic of `triton_kernels.py` in small functions of a row, its lanes, or a block (LANES, PER_LANE) of logits.

`s` and `t` are the student's and the teacher's logits in float32, -inf at the target. A lane is a few neighbouring
columns, given by the first of them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_start(logits, row, stride, ALIGNED: tl.constexpr):
    """A pointer to the row; that its offset is a multiple of ALIGNED lets a thread move 16 bytes at once."""
    return logits + tl.multiple_of(row * stride, ALIGNED)


@triton.jit
def load(row, lanes, C: tl.constexpr, PER_LANE: tl.constexpr):
    """The logits (LANES, PER_LANE) of lanes that begin at these columns, in float32; -inf past the row's end."""
    columns = lanes[:, None] + tl.arange(0, PER_LANE)[None, :]
    return tl.load(row + columns, mask=columns < C, other=-float("inf")).to(tl.float32)


@triton.jit
def load_others(row, lanes, label, C: tl.constexpr, PER_LANE: tl.constexpr):
    """`load` with -inf at the target."""
    return tl.where(is_target(lanes, label, PER_LANE), -float("inf"), load(row, lanes, C, PER_LANE))


@triton.jit
def load_target(row, label):
    """The target's logit in float32; NaN where it is +inf or the label is not a class."""
    logit = tl.load(row + label, mask=label >= 0, other=float("nan")).to(tl.float32)
    return tl.where(logit == float("inf"), float("nan"), logit)


@triton.jit
def is_target(lanes, label, PER_LANE: tl.constexpr):
    """Booleans (LANES, PER_LANE)."""
    return (label - lanes)[:, None] == tl.arange(0, PER_LANE)[None, :]


@triton.jit
def store_slope(gradient, lanes, slope, at_target, label, C: tl.constexpr):
    """A block of the gradient."""
    columns = lanes[:, None] + tl.arange(0, slope.shape[1])[None, :]
    slope = tl.where(is_target(lanes, label, slope.shape[1]), at_target, slope)
    tl.store(gradient + columns, slope, mask=columns < C, eviction_policy="evict_first")


@triton.jit
def store_terms(terms, flags, row, N, ce, tckd, nckd, dkd, agrees, fault):
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
def fold(
    state, student, teacher, lanes, label, rate, C: tl.constexpr, PER_LANE: tl.constexpr, WITH_E_1: tl.constexpr
):  # fmt: skip
    """One block more in the lanes' terms; also the block's exponentials below the lanes' maxima.

    The state, (LANES,) each: `top_s` and `top_t`, the largest logits; `sum_s` = Σ exp((s − top_s)/T) and `sum_t`;
    `sum_1` = Σ exp(s − top_s); `cross` = Σ exp((t − top_t)/T)·gap, gap = (t − top_t) − (s − top_s); `widest`, +inf if
    any gap was; `first_s` and `first_t`, the first column of the block's lane where the maximum was found.
    """
    top_s, top_t, sum_s, sum_t, sum_1, cross, widest, first_s, first_t = state
    s, t = load_others(student, lanes, label, C, PER_LANE), load_others(teacher, lanes, label, C, PER_LANE)
    new_s, new_t = tl.max(s, 1), tl.max(t, 1)
    first_s, first_t = tl.where(new_s > top_s, lanes, first_s), tl.where(new_t > top_t, lanes, first_t)
    new_s, new_t = tl.maximum(new_s, top_s), tl.maximum(new_t, top_t)
    # Of a lane with nothing but -inf so far, the exponentials are to be 0.
    base_s, base_t = tl.where(new_s == -float("inf"), 0.0, new_s), tl.where(new_t == -float("inf"), 0.0, new_t)
    falls_s, falls_t = top_s - base_s, top_t - base_t
    keeps_s, keeps_t = tl.exp2(falls_s * rate), tl.exp2(falls_t * rate)
    s, t = s - base_s[:, None], t - base_t[:, None]
    e_s, e_t, gap = tl.exp2(s * rate), tl.exp2(t * rate), t - s
    cross = times(keeps_t, cross + times(sum_t, falls_t - falls_s)) + tl.sum(e_t * tl.where(e_t == 0, 0.0, gap), 1)
    sum_s, sum_t = sum_s * keeps_s + tl.sum(e_s, 1), sum_t * keeps_t + tl.sum(e_t, 1)
    e_1 = e_s
    if WITH_E_1:
        e_1 = tl.exp2(s * LOG2_E)
        sum_1 = sum_1 * tl.exp2(falls_s * LOG2_E) + tl.sum(e_1, 1)
    widest = tl.maximum(widest, tl.max(gap, 1))
    return (new_s, new_t, sum_s, sum_t, sum_1, cross, widest, first_s, first_t), e_s, e_t, e_1


@triton.jit
def argmax(row, first, top, target, label, C: tl.constexpr, PER_LANE: tl.constexpr):
    """The first class with the row's largest logit: a look at the lane that begins at `first`, and at the target."""
    columns = first + tl.arange(0, PER_LANE)
    logits = tl.load(row + columns, mask=(columns < C) & (columns != label), other=-float("inf")).to(tl.float32)
    other = tl.min(tl.where(logits == top, columns, C), 0)
    return tl.where((target > top) | ((target == top) & (label < other)), label, other)


@triton.jit
def join4(a, b, c, d):
    """Four (LANES,) as one, so that threads meet once to reduce them all."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def split4(reduced):
    """What `join4` joined, after the lanes were reduced."""
    first, second = tl.split(reduced)
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


@triton.jit
def masks_mass(s, t):
    """Where the student masks a class to which the teacher gives mass."""
    return (s == -float("inf")) & (t > -float("inf"))


@triton.jit
def times(weights, values):
    """The product, 0 where the weight is 0 even if the value is infinite or NaN."""
    return tl.where(weights == 0, 0.0, weights * values)


@triton.jit
def exp2_below(logits, top, rate):
    """2^((logits − top)·rate), 0 where every class is masked."""
    return tl.exp2((logits - tl.where(top == -float("inf"), 0.0, top)) * rate)


@triton.jit
def sigmoids(odds):
    """sigmoid(odds) and 1 − sigmoid(odds), both to the last digits."""
    e = tl.exp(-tl.abs(odds))
    larger = 1 / (1 + e)
    return tl.where(odds < 0, e * larger, larger), tl.where(odds < 0, larger, e * larger)


@triton.jit
def log_sigmoid(odds):
    """min(odds, 0) − log1p(e), e = exp(−|odds|); what 1 + e lost to rounding is added to its logarithm."""
    e = tl.exp(-tl.abs(odds))
    rounded = 1 + e
    return tl.minimum(odds, 0.0) - (tl.log(rounded) + (e - (rounded - 1)))
