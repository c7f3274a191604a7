"""One pass over rows of logits: every term of the loss and its gradient, a block of rows at a time.

The gradient is derived by hand. With q the softmax over the non-target classes, p and b the probabilities of the target
of student and teacher, all at temperature T, the gradient of a row's T²·(α·TCKD + β·NCKD) is

    αT(p − b) at the target y, and T[β(q_s,i − q_t,i) − α(p − b)·q_s,i] at the other classes i.

Blocks are small enough to stay in the processor's cache: memory is read and written once, and nothing of the size of
the logits exists but the gradient.
"""

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from .arithmetic import student_masks_mass, unusable_teacher_rows
from .decoupled import row_divergences, row_kl, target_odds, weighted_sum
from .grouped import mixed_groups, row_grouped_kl, top_k_groups, weighted_groups

_BLOCK_BYTES = 2**22
_BLOCK_BYTES_ON_DEVICE = 2**26
# Of the target against the rest: beyond, the smaller of the two has few digits left in float32.
_WIDEST_ODDS = 60.0
# Of the largest logit and T: the quotient is rounded, by more than a teacher torn between two distant classes allows.
_LARGEST_QUOTIENT = 128.0

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
    kernels = _kernels(student, teacher) if partition is None else None
    if kernels is not None:
        options: dict[str, Any] = {"ignore_index": ignore_index, "scale": scale, "gradient": gradient}
        return kernels.row_pass(student, teacher, labels, weights, **options)
    dtype = terms_dtype(student, teacher)
    on_cpu, ignored = labels.device.type == "cpu", labels == ignore_index
    chosen = None
    # Leaving rows out reads the device. Elsewhere than on a CPU they are computed, as rows of zeros.
    if on_cpu and ignored.any():
        chosen = (~ignored).nonzero().squeeze(1)
        if gradient is not None:
            gradient[ignored] = 0.0
    count, classes = len(labels) if chosen is None else len(chosen), student.shape[1]
    size = max(1, min(count, (_BLOCK_BYTES if on_cpu else _BLOCK_BYTES_ON_DEVICE) // (classes * dtype.itemsize)))
    # With two classes NCKD is 0 exactly, which rounding must not spoil.
    by_hand = on_cpu and partition is None and classes > 2
    memory = torch.empty(4, size, classes, dtype=dtype) if by_hand else None
    found = []
    for start in range(0, count, size):
        rows = slice(start, start + size) if chosen is None else chosen[start : start + size]
        block = student[rows].to(dtype), teacher[rows].to(dtype), labels[rows].unsqueeze(1)
        factor = None if gradient is None else scale
        if not on_cpu:
            left_out = ignored[rows].unsqueeze(1)
            block = (
                block[0].masked_fill(left_out, 0),
                block[1].masked_fill(left_out, 0),
                block[2].masked_fill(left_out, 0),
            )
            factor = None if gradient is None else scale * (~left_out).to(dtype)
        if memory is None:
            mixed = None if partition is None or partition.mixed is None else partition.mixed[rows]
            groups = None if partition is None else partition._replace(mixed=mixed)
            terms, slope = _block_by_autograd(*block, weights, factor, groups)
        else:
            terms, slope = _block(*block, weights, factor, memory[:, : len(block[2])])
        found.append(terms if on_cpu else [term.masked_fill(left_out, 0) for term in terms])
        if gradient is not None and slope is not None:
            gradient[rows] = slope.to(gradient.dtype)
    if not found:
        return _no_rows(labels, dtype)
    return RowTerms(*(_at_rows(torch.cat(parts).squeeze(1), chosen, labels) for parts in zip(*found, strict=True)))


def _kernels(student: Tensor, teacher: Tensor) -> Any:
    """The module of GPU kernels, where they take these logits and Triton is installed; None otherwise."""
    supported = all(
        logits.is_cuda and logits.stride(1) == 1 and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for logits in (student, teacher)
    )
    if not supported or find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


def _block(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights, scale: Tensor | float | None, memory: Tensor
) -> tuple[RowTerms, Tensor | None]:
    """The terms of a block of rows, (R, 1) each, and the gradient (R, C) times `scale`; None without a scale."""
    alpha, temperature, ce_weight, with_ce = (
        weights.alpha,
        weights.temperature,
        weights.ce_weight or 0.0,
        weights.ce_weight is not None,
    )
    s_others, t_others, gaps, hard_others = memory
    (s_rest, t_rest), odds = _divided((student, teacher), labels, temperature, memory[:2])
    torch.sub(teacher, student, out=gaps)
    target_gap = gaps.gather(1, labels)
    gap = gaps.scatter_(1, labels, 0.0).mul_(t_others).sum(1, keepdim=True)
    if not gap.isfinite().all():
        # A class that the teacher masks is at an infinite distance, which counts for nothing.
        gap = gaps.masked_fill_(teacher == -math.inf, 0.0).sum(1, keepdim=True)
    # Probabilities of the target and of the rest; none is a difference, so that all keep their digits.
    (log_p, log_b), (log_p_rest, log_b_rest) = logs = logsigmoid(torch.stack((odds, -odds)))
    (p, b), (p_rest, b_rest) = logs.exp()
    tckd = b * (log_b - log_p) + b_rest * (log_b_rest - log_p_rest)
    nckd = (gap / t_rest - target_gap) / temperature + (odds[1] - odds[0])
    ce, ce_rest, widest = -log_p, p_rest, odds.abs().amax(0)
    if with_ce and temperature != 1:
        (hard_rest,), (hard_odds,) = _divided((student,), labels, 1.0, memory[3:])
        ce, ce_rest = -logsigmoid(hard_odds), torch.sigmoid(-hard_odds)
        widest = torch.maximum(widest, hard_odds.abs())
    dkd = temperature**2 * _weighted(weights, tckd, nckd, b_rest)
    tops = _argmax(student), _argmax(teacher)
    nothing, agrees = torch.zeros_like(tckd), tops[0] == tops[1]
    terms = RowTerms(ce if with_ce else nothing, tckd, nckd, nothing, dkd, agrees, nothing.to(torch.uint8))
    slope = None
    if scale is not None:
        excess = alpha * torch.where(p < p_rest, p - b, b_rest - p_rest)
        of_others = alpha * b_rest if weights.classical else weights.beta
        of_student, at_target = temperature * (of_others - excess), temperature * excess - ce_weight * ce_rest
        if ce_weight and temperature == 1:
            of_student = of_student + ce_weight * ce_rest
        slope = s_others.mul_(scale * of_student / s_rest)
        slope.addcmul_(t_others, -scale * temperature * of_others / t_rest)
        if ce_weight and temperature != 1:
            slope.addcmul_(hard_others, scale * ce_weight * ce_rest / hard_rest)
        slope.scatter_(1, labels, scale * at_target)
    # Rows with a masked target or a fault, or with gaps too wide for the short cuts.
    small = (widest < _WIDEST_ODDS) & (tckd + nckd + ce).isfinite()
    if temperature != 1:
        largest = torch.maximum(student.gather(1, tops[0]).abs(), teacher.gather(1, tops[1]).abs())
        small &= largest < _LARGEST_QUOTIENT * temperature
    if not small.all():
        wide = ~small.squeeze(1)
        exact = _block_by_autograd(student[wide], teacher[wide], labels[wide], weights, scale)
        for values, right in zip(terms, exact[0], strict=True):
            values[wide] = right
        if slope is not None:
            slope[wide] = exact[1]
    return terms, slope


def _divided(models: tuple[Tensor, ...], labels: Tensor, temperature: float, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each model the mass of the non-target classes, up to a factor, and the log-odds of the target, (M, R, 1).

    `others` (M, R, C) receives the probabilities of the other classes up to the same factor, by which torch's sum over
    a large vocabulary is off; 0 for the target. Ratios are free of it.
    """
    for logits, memory in zip(models, others, strict=True):
        if temperature != 1:
            logits = torch.div(logits, temperature, out=memory)
        torch.softmax(logits, 1, out=memory)
    index = labels.expand(len(models), -1, 1)
    target = others.gather(2, index)
    rest = others.scatter_(2, index, 0.0).sum(2, keepdim=True)
    return rest, target.log() - rest.log()


def _block_by_autograd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Weights,
    scale: Tensor | float | None,
    partition: Partition | None = None,
) -> tuple[RowTerms, Tensor | None]:
    """`_block` from the definition: for any rows and partition, without reading the device."""
    index, temperature = labels.squeeze(1), weights.temperature
    with torch.set_grad_enabled(scale is not None):
        student = student.detach().requires_grad_(scale is not None)
        second = torch.zeros_like(student[:, 0])
        if partition is None:
            tckd, nckd = row_divergences(student, teacher, index, temperature=temperature)
            b_rest = torch.sigmoid(-target_odds(teacher, index, temperature))
            dkd = _weighted(weights, tckd, nckd, b_rest)
        else:
            groups = _groups(teacher, partition)
            parts = row_grouped_kl(student, teacher, groups, 3, temperature=temperature)
            tckd, (_, second, nckd) = parts.between, parts.within.unbind(1)
            dkd = weighted_groups(parts, weights.alpha, (0.0, partition.second_beta, weights.beta))
            if weights.classical:
                dkd = weights.alpha * row_kl(student, teacher, temperature=temperature)
        dkd = temperature**2 * dkd
        with_ce = weights.ce_weight is not None
        ce = cross_entropy(student, index, reduction="none") if with_ce else torch.zeros_like(tckd)
        slope = None
        if scale is not None:
            rows = weights.ce_weight * ce + dkd if weights.ce_weight else dkd
            slope = torch.autograd.grad((scale * rows.unsqueeze(1)).sum(), student)[0]
    masks, unusable = student_masks_mass(student, teacher), unusable_teacher_rows(teacher, index)
    fault = torch.where(unusable, TEACHER_UNUSABLE, torch.where(masks, STUDENT_MASKS, 0)).to(torch.uint8)
    agrees = student.argmax(1) == teacher.argmax(1)
    return RowTerms(*(term.detach().unsqueeze(1) for term in (ce, tckd, nckd, second, dkd, agrees, fault))), slope


def _groups(teacher: Tensor, partition: Partition) -> Tensor:
    if partition.mixed is None or partition.top_k:
        return top_k_groups(teacher, partition.top_k)
    return mixed_groups(partition.mixed)


def _weighted(weights: Weights, tckd: Tensor, nckd: Tensor, b_rest: Tensor) -> Tensor:
    """α·TCKD + β·NCKD, or classical α·KL, where a weight of 0 removes its term even if that is infinite."""
    if weights.classical:
        return weighted_sum(tckd + (b_rest * nckd).masked_fill(b_rest == 0, 0.0), nckd, weights.alpha, 0.0)
    return weighted_sum(tckd, nckd, weights.alpha, weights.beta)


def _argmax(logits: Tensor) -> Tensor:
    # NumPy's is about seven times as fast as torch's on a CPU; both name the first of equals.
    return torch.from_numpy(logits.numpy().argmax(1, keepdims=True))


def _at_rows(values: Tensor, chosen: Tensor | None, labels: Tensor) -> Tensor:
    return values if chosen is None else values.new_zeros(labels.shape).index_copy_(0, chosen, values)


def _no_rows(labels: Tensor, dtype: torch.dtype) -> RowTerms:
    return RowTerms(*(torch.zeros(labels.shape, dtype=kind, device=labels.device) for kind in kinds_of_terms(dtype)))
