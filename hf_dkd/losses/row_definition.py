"""The terms and the gradient of rows from the definitions: for any rows, partition and device."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .arithmetic import binary_kl, kl, student_masks_mass, unusable_teacher_rows
from .decoupled import row_kl, split_at_target, weighted_sum
from .grouped import mixed_groups, row_grouped_kl, top_k_groups, weighted_groups
from .row_terms import STUDENT_MASKS, TEACHER_UNUSABLE, Partition, RowTerms, Weights

# ce, tckd, nckd, second and dkd of each row, and the gradient.
_Found = tuple[list[Tensor], Tensor | None]


def rows_by_definition(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Weights,
    scale: Tensor | float | None,
    partition: Partition | None = None,
) -> tuple[RowTerms, Tensor | None]:
    """The terms of rows, (R,) each, and the gradient (R, C) of their losses times `scale`; None without a scale.

    Both models' logits are float32, or both float64. Nothing is read from the device. `scale` is a number, a scalar, or
    (R,).
    """
    if partition is None:
        numbers, slope = _target_and_rest(student, teacher, labels, weights, scale)
    else:
        numbers, slope = _groups(student, teacher, labels, weights, scale, partition)
    masks, unusable = student_masks_mass(student, teacher), unusable_teacher_rows(teacher, labels)
    fault = torch.where(unusable, TEACHER_UNUSABLE, torch.where(masks, STUDENT_MASKS, 0)).to(torch.uint8)
    agrees = student.argmax(1) == teacher.argmax(1)
    return RowTerms(*(term.detach() for term in (*numbers, agrees, fault))), slope


@torch.no_grad()
def _target_and_rest(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights, scale: Tensor | float | None
) -> _Found:
    # Not by autograd, which is off inside the operator that torch.compile sees.
    alpha, beta, temperature, ce_weight, classical = weights
    s_odds, s_others = split_at_target(student, labels, temperature)
    t_odds, t_others = split_at_target(teacher, labels, temperature)
    p, p_rest, b, b_rest = (torch.sigmoid(odds) for odds in (s_odds, -s_odds, t_odds, -t_odds))
    tckd, nckd = binary_kl(t_odds, s_odds), kl(t_others, s_others)
    nothing = torch.zeros_like(tckd)
    if classical:
        # A weight of 0 removes its term even if that is infinite.
        dkd = weighted_sum(tckd + (b_rest * nckd).masked_fill(b_rest == 0, 0.0), nckd, alpha, 0.0)
    else:
        dkd = weighted_sum(tckd, nckd, alpha, beta)
    ce = nothing if ce_weight is None else cross_entropy(student, labels, reduction="none")
    numbers = [ce, tckd, nckd, nothing, temperature**2 * dkd]
    if scale is None:
        return numbers, None

    excess = alpha * torch.where(p < p_rest, p - b, b_rest - p_rest)  # α(p − b)
    of_gap = alpha * b_rest if classical else torch.full_like(b_rest, beta)
    at_target, q_s, q_t = temperature * excess, s_others.exp(), t_others.exp()
    slope = temperature * (of_gap.unsqueeze(1) * (q_s - q_t) - excess.unsqueeze(1) * q_s)
    if ce_weight:
        hard_odds, hard_others = split_at_target(student, labels, 1.0)
        of_hard = ce_weight * torch.sigmoid(-hard_odds)
        slope += of_hard.unsqueeze(1) * hard_others.exp()
        at_target -= of_hard
    slope.scatter_(1, labels.unsqueeze(1), at_target.unsqueeze(1))
    return numbers, slope * (scale.to(slope).reshape(-1, 1) if isinstance(scale, Tensor) else scale)


def _groups(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Weights,
    scale: Tensor | float | None,
    partition: Partition,
) -> _Found:
    temperature, ce_weight = weights.temperature, weights.ce_weight
    with torch.set_grad_enabled(scale is not None):
        student = student.detach().requires_grad_(scale is not None)
        top_k, mixed = partition.top_k, partition.mixed
        groups = top_k_groups(teacher, top_k) if top_k or mixed is None else mixed_groups(mixed)
        parts = row_grouped_kl(student, teacher, groups, 3, temperature=temperature)
        tckd, (_, second, nckd) = parts.between, parts.within.unbind(1)
        dkd = weighted_groups(parts, weights.alpha, (0.0, partition.second_beta, weights.beta))
        if weights.classical:
            dkd = weights.alpha * row_kl(student, teacher, temperature=temperature)
        dkd = temperature**2 * dkd
        ce = torch.zeros_like(tckd) if ce_weight is None else cross_entropy(student, labels, reduction="none")
        slope = None
        if scale is not None:
            rows = ce_weight * ce + dkd if ce_weight else dkd
            slope = torch.autograd.grad((scale * rows).sum(), student)[0]
    return [ce, tckd, nckd, second, dkd], slope
