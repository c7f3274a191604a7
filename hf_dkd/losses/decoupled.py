"""Decoupled knowledge distillation on rows of logits: the definition.

Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022, arXiv 2203.08679. Pure functions of tensors, with autograd
for the gradient. Half-precision inputs are computed and returned in float32; float64 stays float64.

A class is masked by a logit of -inf. Where both models, or only the teacher, mask a class, its term is 0.
"""

import math

import torch
from torch import Tensor

from .arithmetic import (
    STUDENT_MASKS_MASS,
    below_peak,
    binary_kl,
    check_logits,
    check_range,
    check_weight,
    checked_labels,
    kl,
    log_probs,
    reduce,
    same_precision,
    student_masks_mass,
)


def decoupled_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Split KL(teacher ‖ student) of each row at its target class (paper, Eq. 5 to 7).

    With b the teacher's probability of the target class, both at temperature T, and per row:

    - TCKD = KL between the two-class distributions (target, everything else) of teacher and student;
    - NCKD = KL between the distributions over the non-target classes alone;
    - KL(teacher ‖ student) = TCKD + (1 − b)·NCKD.

    Args:
        student_logits: (N, C), any floating dtype, C ≥ 2.
        teacher_logits: (N, C); no gradient flows to it.
        labels: (N,) integers in [0, C).
        temperature: T > 0. The divergences are not multiplied by T².

    Returns:
        tckd, nckd: two (N,) tensors in nats, float32 (float64 where an input is float64).

    Raises:
        ValueError: for shapes, dtypes, labels or temperatures other than these; where the student masks (-inf) a class
            to which the teacher gives mass; where the teacher masks every non-target class of a row. Checking values
            reads the device once; inside `torch.compile` that check is left out.
    """
    check_logits(student_logits, teacher_logits, temperature)
    labels = checked_labels(labels, student_logits.shape)
    if not torch.compiler.is_compiling():
        _raise_on_bad_values(student_logits, teacher_logits, labels)
    return row_divergences(student_logits, teacher_logits, labels, temperature=temperature)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """T²·(α·TCKD + β·NCKD) (paper, Eq. 7 and algorithm 1). See `decoupled_kl` for shapes, dtypes and errors.

    A weight of 0 removes its term altogether, however large the term is.

    Args:
        alpha: weight of TCKD, ≥ 0.
        beta: weight of NCKD, ≥ 0. With two classes NCKD is exactly 0.
        ignore_index: rows with this label are left out, whatever their logits.
        reduction: `"mean"` over the rows that are not ignored (0 if there is none), `"sum"`, or `"none"`: (N,), 0 for
            ignored rows.
    """
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    check_logits(student_logits, teacher_logits, temperature)
    labels = checked_labels(labels, student_logits.shape)
    kept = labels != ignore_index
    tckd, nckd = decoupled_kl(student_logits[kept], teacher_logits[kept], labels[kept], temperature=temperature)
    rows = temperature**2 * weighted_sum(tckd, nckd, alpha, beta)
    if reduction == "none":
        return rows.new_zeros(labels.shape).masked_scatter(kept, rows)
    return reduce(rows, reduction)


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Classical distillation, T²·KL(teacher ‖ student) (Hinton et al. 2015, arXiv 1503.02531).

    Shapes, dtypes and temperature as in `decoupled_kl`; `reduction` is `"mean"` over rows, `"sum"` or `"none"`.

    Raises:
        ValueError: as `decoupled_kl`, where the teacher masks every class of a row instead of every non-target one.
    """
    check_logits(student_logits, teacher_logits, temperature)
    if not torch.compiler.is_compiling():
        if student_masks_mass(student_logits, teacher_logits).any():
            raise ValueError(STUDENT_MASKS_MASS)
        masked = teacher_logits.amax(1) == -math.inf
        if masked.any():
            raise ValueError(f"The teacher masks (-inf) every class of row {int(masked.nonzero()[0])}: leave it out.")
    return reduce(temperature**2 * row_kl(student_logits, teacher_logits, temperature=temperature), reduction)


def row_divergences(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """`decoupled_kl` without its checks: nothing is read from the device."""
    student, teacher = same_precision(student_logits, teacher_logits)
    student_odds, student_others = split_at_target(student, labels, temperature)
    teacher_odds, teacher_others = split_at_target(teacher, labels, temperature)
    return binary_kl(teacher_odds, student_odds), kl(teacher_others, student_others)


def row_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of each row at temperature T, (N, C), (N, C) → (N,), without checks and without T²."""
    student, teacher = same_precision(student_logits, teacher_logits)
    student, teacher = (below_peak(logits, logits) / temperature for logits in (student, teacher))
    return kl(log_probs(teacher), log_probs(student))


def weighted_sum(tckd: Tensor, nckd: Tensor, alpha: float, beta: float) -> Tensor:
    """α·TCKD + β·NCKD, where a weight of 0 removes its term even if that is infinite; always part of the graph."""
    terms = [weight * term for weight, term in ((alpha, tckd), (beta, nckd)) if weight != 0]
    return sum(terms[1:], terms[0]) if terms else tckd.masked_fill(torch.ones_like(tckd, dtype=torch.bool), 0.0)


def split_at_target(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-odds of the target (N,), and log-probabilities among the other classes (N, C), -inf at the target."""
    target = labels.unsqueeze(1)
    others = logits.scatter(1, target, -math.inf)
    target_logits = below_peak(logits.gather(1, target), others) / temperature
    others = below_peak(others, others) / temperature
    return (target_logits.squeeze(1) - others.logsumexp(1)), log_probs(others)


def _raise_on_bad_values(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
    check_range(labels, student_logits.shape[1])
    if student_masks_mass(student_logits, teacher_logits).any():
        raise ValueError(STUDENT_MASKS_MASS)
    masked = teacher_logits.scatter(1, labels.unsqueeze(1), -math.inf).amax(1) == -math.inf
    if masked.any():
        row = int(masked.nonzero()[0])
        raise ValueError(
            f"The teacher masks (-inf) every non-target class of row {row}, label {labels[row].item()}: NCKD needs at "
            "least one. Leave the row out with ignore_index."
        )
