"""The loss as the paper defines it (arXiv 2203.08679, Eq. 1 to 7), for float64 tensors: what the tests compare with.

Written from the definitions alone: probabilities from one softmax over the classes, the non-target classes gathered
out. Nothing is rearranged for range or speed, so that it shares no formula with `hf_dkd.losses`. It holds for finite
logits whose gaps are below 700·T, and autograd differentiates it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div


def divergences(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TCKD, NCKD, KL over all classes, and the teacher's target probability b: (N, C), (N, C), (N,) → four (N,)."""
    student, teacher = student / temperature, teacher.detach() / temperature
    b_teacher, b_student = _target_and_rest(teacher, labels), _target_and_rest(student, labels)
    tckd = _kl(b_teacher.log(), b_student.log())
    nckd = _kl(non_target(teacher, labels).log_softmax(1), non_target(student, labels).log_softmax(1))
    return tckd, nckd, _kl(teacher.log_softmax(1), student.log_softmax(1)), b_teacher[:, 0]


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """T²·(α·TCKD + β·NCKD) of each row, (N,)."""
    tckd, nckd, _, _ = divergences(student, teacher, labels, temperature)
    return temperature**2 * (alpha * tckd + beta * nckd)


def dkd_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The gradient of `dkd` written out: αT(p − b) at the target, T[β(q_s − q_t) − α(p − b)·q_s] elsewhere, (N, C).

    The largest logit is subtracted before dividing by T, so that no rounding of a large quotient enters the softmax.
    """
    student, teacher = ((logits - logits.amax(1, keepdim=True)) / temperature for logits in (student, teacher))
    p, p_rest = _target_and_rest(student, labels).unsqueeze(-1).unbind(1)
    b, b_rest = _target_and_rest(teacher, labels).unsqueeze(-1).unbind(1)
    excess = torch.where(p < p_rest, p - b, b_rest - p_rest)  # p − b, from the two numbers that keep its digits
    q_student, q_teacher = (non_target(logits, labels).softmax(1) for logits in (student, teacher))
    gradient = torch.empty_like(student).scatter(1, labels[:, None], alpha * temperature * excess)
    others = temperature * (beta * (q_student - q_teacher) - alpha * excess * q_student)
    return gradient.scatter(1, _non_target_classes(student, labels), others)


def grouped(
    student: Tensor, teacher: Tensor, groups: Tensor, num_groups: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """KL between groups (N,), KL within each (N, G), and the teacher's masses (N, G), row by row and class by class."""
    p, q = ((logits / temperature).softmax(1) for logits in (teacher.detach(), student))
    between, within, masses = [], [], []
    for p_row, q_row, group_row in zip(p, q, groups, strict=True):
        members = [group_row == group for group in range(num_groups)]
        p_masses, q_masses = ([row[inside].sum() for inside in members] for row in (p_row, q_row))
        filled = [group for group in range(num_groups) if members[group].any()]
        between.append(sum(p_masses[g] * (p_masses[g] / q_masses[g]).log() for g in filled))
        inner = torch.zeros(num_groups, dtype=student.dtype)
        for g in filled:
            p_inner, q_inner = p_row[members[g]] / p_masses[g], q_row[members[g]] / q_masses[g]
            inner[g] = (p_inner * (p_inner / q_inner).log()).sum()
        within.append(inner)
        masses.append(torch.stack(p_masses))
    return torch.stack(between), torch.stack(within), torch.stack(masses)


def non_target(values: Tensor, labels: Tensor) -> Tensor:
    """The C − 1 columns of each row that are not its target, in order: (N, C), (N,) → (N, C − 1)."""
    return values.gather(1, _non_target_classes(values, labels))


def gradient_of(loss: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """The gradient that autograd finds for the sum of `loss(student)`."""
    leaf = student.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return gradient


def gradient_tolerance(gradient: Tensor, size: float) -> Tensor:
    """1e-12 of each row's maximum, not below the rounding of float64 for a gradient of `size` = T(α + β): (N, 1).

    Entries are sums of probabilities times αT or βT. Where the models nearly agree these cancel, and what is left has
    the absolute error of its terms: a probability is off by 2u at most (u = 1.1e-16; its exponential by u, its sum
    and quotient by u; an error of k·u in an exponent −k scales it by e^−k), an entry by 4u·size in the loss and as
    much in the oracle. 8u = 0.9e-15, so the maximum counts as 1e-3·size at least. (The largest difference from 40
    digits over 4,000 drawn rows: 4.3e-16·size in the loss, 3.8e-16·size in the oracle.)
    """
    return 1e-12 * gradient.abs().amax(1, keepdim=True).clamp(min=1e-3 * size)


def assert_within(actual: Tensor, expected: Tensor | float, tolerance: Tensor | float) -> None:
    """|actual − expected| ≤ tolerance, elementwise after broadcasting. NaN fails."""
    error = (actual.double() - expected).abs()
    excess = torch.where(error.isnan(), torch.inf, error - tolerance).max().item()
    assert excess <= 0, f"The largest error, {error.max().item():.3g}, is {excess:.3g} above its tolerance."


def _non_target_classes(values: Tensor, labels: Tensor) -> Tensor:
    columns = torch.arange(values.shape[1] - 1)
    return columns + (columns >= labels[:, None])


def _target_and_rest(logits: Tensor, labels: Tensor) -> Tensor:
    """The two-class distribution (p_t, 1 − p_t), (N, 2). The second is a sum, not a difference, to keep its digits."""
    p = logits.softmax(1)
    return torch.stack((p.gather(1, labels[:, None]).squeeze(1), non_target(p, labels).sum(1)), dim=1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
