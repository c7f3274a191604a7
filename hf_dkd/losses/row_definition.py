"""The terms and the gradient of rows from the definitions, by autograd: for any rows, partition and device."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .arithmetic import student_masks_mass, unusable_teacher_rows
from .decoupled import row_divergences, row_kl, target_odds, weighted_sum
from .grouped import mixed_groups, row_grouped_kl, top_k_groups, weighted_groups
from .row_terms import STUDENT_MASKS, TEACHER_UNUSABLE, Partition, RowTerms, Weights


def rows_by_autograd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Weights,
    scale: Tensor | float | None,
    partition: Partition | None = None,
) -> tuple[RowTerms, Tensor | None]:
    """The terms of rows, (R,) each, and the gradient (R, C) of their losses times `scale`; None without a scale.

    Nothing is read from the device. `scale` is a number, a scalar, or (R,).
    """
    temperature = weights.temperature
    with torch.set_grad_enabled(scale is not None):
        student = student.detach().requires_grad_(scale is not None)
        second = torch.zeros_like(student[:, 0])
        if partition is None:
            tckd, nckd = row_divergences(student, teacher, labels, temperature=temperature)
            b_rest = torch.sigmoid(-target_odds(teacher, labels, temperature))
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
        ce = cross_entropy(student, labels, reduction="none") if with_ce else torch.zeros_like(tckd)
        slope = None
        if scale is not None:
            rows = weights.ce_weight * ce + dkd if weights.ce_weight else dkd
            slope = torch.autograd.grad((scale * rows).sum(), student)[0]
    masks, unusable = student_masks_mass(student, teacher), unusable_teacher_rows(teacher, labels)
    fault = torch.where(unusable, TEACHER_UNUSABLE, torch.where(masks, STUDENT_MASKS, 0)).to(torch.uint8)
    agrees = student.argmax(1) == teacher.argmax(1)
    return RowTerms(*(term.detach() for term in (ce, tckd, nckd, second, dkd, agrees, fault))), slope


def _groups(teacher: Tensor, partition: Partition) -> Tensor:
    if partition.mixed is None or partition.top_k:
        return top_k_groups(teacher, partition.top_k)
    return mixed_groups(partition.mixed)


def _weighted(weights: Weights, tckd: Tensor, nckd: Tensor, b_rest: Tensor) -> Tensor:
    """α·TCKD + β·NCKD, or classical α·KL, where a weight of 0 removes its term even if that is infinite."""
    if weights.classical:
        return weighted_sum(tckd + (b_rest * nckd).masked_fill(b_rest == 0, 0.0), nckd, weights.alpha, 0.0)
    return weighted_sum(tckd, nckd, weights.alpha, weights.beta)
