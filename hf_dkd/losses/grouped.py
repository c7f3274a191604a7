"""The decomposition for any partition of the classes: between groups of classes, and within each group.

With the two groups {target} and {all others} these are the terms of Zhao et al., *Decoupled Knowledge Distillation*,
CVPR 2022 (arXiv 2203.08679, Eq. 5 to 7); the chain rule of KL gives them for every other partition. Dtypes and masked
classes (-inf) are treated as in `decoupled`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arithmetic import (
    STUDENT_MASKS_MASS,
    below_peak,
    check_logits,
    check_weight,
    kl,
    log_probs,
    reduce,
    same_precision,
    student_masks_mass,
)


class GroupedKL(NamedTuple):
    """The parts of KL(teacher ‖ student): `between` + Σ over groups of `masses`·`within`, for each row."""

    between: Tensor
    """(N,): KL between the distributions over groups. TCKD, where the groups are the target and the rest."""
    within: Tensor
    """(N, G): KL among the classes of each group alone; 0 in a group of one class or none. NCKD, for the rest."""
    masses: Tensor
    """(N, G): the teacher's probability of each group at temperature T; no gradient flows to it."""


def grouped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    groups: Tensor,
    *,
    temperature: float = 1.0,
    num_groups: int | None = None,
) -> GroupedKL:
    """Split KL(teacher ‖ student) of each row between and within groups of classes, by the chain rule of KL.

    Args:
        student_logits: (N, C), any floating dtype, C ≥ 2.
        teacher_logits: (N, C); no gradient flows to it.
        groups: (N, C) integers: the group, 0 to G − 1, of each class of each row. A row may leave groups empty.
        temperature: T > 0. The divergences are not multiplied by T².
        num_groups: G; by default one more than the largest group, which reads the device.

    Returns:
        In nats, float32 (float64 where an input is float64).

    Raises:
        ValueError: for shapes, dtypes, groups or temperatures other than these; where the student masks (-inf) a class
            to which the teacher gives mass; where the teacher masks every class of a row. Checking values reads the
            device once; inside `torch.compile` that check is left out.
    """
    check_logits(student_logits, teacher_logits, temperature)
    if groups.shape != student_logits.shape or groups.is_floating_point() or groups.dtype == torch.bool:
        raise ValueError(
            f"groups are {groups.dtype} of shape {tuple(groups.shape)}; expected an integer group for each logit, "
            f"{tuple(student_logits.shape)}."
        )
    if not torch.compiler.is_compiling():
        num_groups = _checked_number(groups, num_groups)
        if student_masks_mass(student_logits, teacher_logits).any():
            raise ValueError(STUDENT_MASKS_MASS)
        masked = teacher_logits.amax(1) == -math.inf
        if masked.any():
            raise ValueError(f"The teacher masks (-inf) every class of row {int(masked.nonzero()[0])}: leave it out.")
    if num_groups is None:
        raise ValueError("Inside torch.compile the number of groups must be given: num_groups=G.")
    return row_grouped_kl(student_logits, teacher_logits, groups, num_groups, temperature=temperature)


def grouped_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    groups: Tensor,
    *,
    alpha: float = 1.0,
    beta: float | Sequence[float] = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """T²·(α·between + Σ over groups of β·within). See `grouped_kl` for shapes, dtypes and errors.

    A weight of 0 removes its term altogether, however large the term is.

    Args:
        alpha: weight of the divergence between groups, ≥ 0.
        beta: weight of the divergence within a group, ≥ 0: one for all groups, or one for each.
        reduction: `"mean"` over the rows, `"sum"`, or `"none"`: (N,).
    """
    check_weight("alpha", alpha)
    betas = [float(beta)] if isinstance(beta, int | float) else [float(one) for one in beta]
    for one in betas:
        check_weight("beta", one)
    num_groups = None if isinstance(beta, int | float) else len(betas)
    parts = grouped_kl(student_logits, teacher_logits, groups, temperature=temperature, num_groups=num_groups)
    return reduce(temperature**2 * weighted_groups(parts, alpha, betas), reduction)


def top_k_groups(teacher_logits: Tensor, k: int) -> Tensor:
    """Groups by the teacher's ranking of the classes: the first alone (0), the second to k-th (1), the others (2).

    The partition of generalised DKD for transformers (Zheng and Cheng 2025, arXiv 2512.04625), there with k = 5.

    Args:
        teacher_logits: (N, C).
        k: 1 to C − 1. With k = 1 group 1 is empty, and the terms are those of DKD with the teacher's choice as target.

    Returns:
        (N, C), for `grouped_kl` with three groups.
    """
    if not 1 <= k < teacher_logits.shape[1]:
        most = teacher_logits.shape[1] - 1
        raise ValueError(f"The k of the top k is {k}; expected 1 to {most}, below the number of classes.")
    best = teacher_logits.topk(k, dim=1).indices
    groups = torch.full_like(teacher_logits, 2, dtype=torch.long)
    return groups.scatter(1, best, 1).scatter(1, best[:, :1], 0)


def mixed_groups(weights: Tensor) -> Tensor:
    """Groups of an example that is mixed of two classes: each of the two alone (0 and 1), and the others (2).

    What the method's author proposes for mixup and CutMix. One class of positive weight alone gives the groups target
    and rest, so that the divergences jump as the other's weight goes to 0: they ask which classes are in the example,
    not how much of them.

    Args:
        weights: (N, C), of which one or two are positive in each row. Nothing is read from the device.

    Returns:
        (N, C), for `grouped_kl` with three groups.
    """
    largest, classes = weights.topk(2, dim=1)
    groups = torch.full_like(weights, 2, dtype=torch.long)
    second = torch.where(largest[:, 1:] > 0, 1, 2)
    return groups.scatter(1, classes[:, 1:], second).scatter(1, classes[:, :1], 0)


def row_grouped_kl(
    student_logits: Tensor, teacher_logits: Tensor, groups: Tensor, num_groups: int, *, temperature: float
) -> GroupedKL:
    """`grouped_kl` without its checks: nothing is read from the device."""
    student, teacher = same_precision(student_logits, teacher_logits)
    student_odds, student_within = _split_at_groups(student, groups, num_groups, temperature)
    teacher_odds, teacher_within = _split_at_groups(teacher, groups, num_groups, temperature)
    within = [kl(of_teacher, of_student) for of_teacher, of_student in zip(teacher_within, student_within, strict=True)]
    masses = torch.nn.functional.logsigmoid(teacher_odds)
    between = kl(masses, torch.nn.functional.logsigmoid(student_odds))
    return GroupedKL(between, torch.stack(within, dim=1), masses.exp())


def weighted_groups(parts: GroupedKL, alpha: float, betas: Sequence[float]) -> Tensor:
    """α·between + Σ β·within of each row, where a weight of 0 removes its term even if that is infinite."""
    if len(betas) == 1:
        betas = list(betas) * parts.within.shape[1]
    weighted = [(alpha, parts.between), *zip(betas, parts.within.unbind(1), strict=True)]
    terms = [weight * term for weight, term in weighted if weight != 0]
    return sum(terms[1:], terms[0]) if terms else torch.where(parts.between.isnan(), 0.0, 0.0 * parts.between)


def _split_at_groups(
    logits: Tensor, groups: Tensor, num_groups: int, temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """Log-odds of each group against all others (N, G), and per group log-probabilities among its classes (N, C)."""
    sizes, within = [], []
    for group in range(num_groups):
        inside = logits.masked_fill(groups != group, -math.inf)
        # A group without a class has no mass; its log-probabilities would be NaN, its divergence is 0.
        empty = inside.amax(1, keepdim=True) == -math.inf
        inside = inside.masked_fill(empty, 0.0)
        peaked = below_peak(inside, inside) / temperature
        within.append(log_probs(peaked))
        peak = below_peak(inside.amax(1, keepdim=True).detach(), logits) / temperature
        size = peak + peaked.logsumexp(1, keepdim=True)
        sizes.append(size.masked_fill(empty, -math.inf))
    return _odds(torch.cat(sizes, dim=1)), within


def _odds(sizes: Tensor) -> Tensor:
    # Against the others, not against the sum: a group of nearly all the mass keeps the digits of what it lacks.
    others = sizes.unsqueeze(1).masked_fill(torch.eye(sizes.shape[1], dtype=torch.bool, device=sizes.device), -math.inf)
    return sizes - others.logsumexp(2)


def _checked_number(groups: Tensor, num_groups: int | None) -> int:
    low, high = (int(groups.min()), int(groups.max())) if groups.numel() else (0, 0)
    if low < 0 or (num_groups is not None and high >= num_groups):
        expected = "0 or above" if num_groups is None else f"0 to {num_groups - 1}"
        raise ValueError(f"groups go from {low} to {high}; expected {expected}.")
    return high + 1 if num_groups is None else num_groups
