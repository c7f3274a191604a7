"""Decoupled knowledge distillation on rows of logits: the definition.

Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022, arXiv 2203.08679. Pure functions of tensors, with autograd
for the gradient. Half-precision inputs are computed and returned in float32; float64 stays float64.

A class is masked by a logit of -inf. Where both models, or only the teacher, mask a class, its term is 0.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
    _check_logits(student_logits, teacher_logits, temperature)
    labels = _checked_labels(labels, student_logits.shape)
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
    _check_weight("alpha", alpha)
    _check_weight("beta", beta)
    _check_logits(student_logits, teacher_logits, temperature)
    labels = _checked_labels(labels, student_logits.shape)
    kept = labels != ignore_index
    tckd, nckd = decoupled_kl(student_logits[kept], teacher_logits[kept], labels[kept], temperature=temperature)
    rows = temperature**2 * weighted_sum(tckd, nckd, alpha, beta)
    if reduction == "none":
        return rows.new_zeros(labels.shape).masked_scatter(kept, rows)
    return _reduce(rows, reduction)


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Classical distillation, T²·KL(teacher ‖ student) (Hinton et al. 2015, arXiv 1503.02531).

    Shapes, dtypes and temperature as in `decoupled_kl`; `reduction` is `"mean"` over rows, `"sum"` or `"none"`.

    Raises:
        ValueError: as `decoupled_kl`, where the teacher masks every class of a row instead of every non-target one.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    if not torch.compiler.is_compiling():
        if student_masks_mass(student_logits, teacher_logits).any():
            raise ValueError(_STUDENT_MASKS_MASS)
        masked = teacher_logits.amax(1) == -math.inf
        if masked.any():
            raise ValueError(f"The teacher masks (-inf) every class of row {int(masked.nonzero()[0])}: leave it out.")
    return _reduce(temperature**2 * row_kl(student_logits, teacher_logits, temperature=temperature), reduction)


def row_divergences(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """`decoupled_kl` without its checks: nothing is read from the device."""
    student, teacher = _same_precision(student_logits, teacher_logits)
    student_odds, student_others = _split_at_target(student, labels, temperature)
    teacher_odds, teacher_others = _split_at_target(teacher, labels, temperature)
    tckd = _kl(_binary_log_probs(teacher_odds), _binary_log_probs(student_odds))
    return tckd, _kl(teacher_others, student_others)


def row_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of each row at temperature T, (N, C), (N, C) → (N,), without checks and without T²."""
    student, teacher = _same_precision(student_logits, teacher_logits)
    student, teacher = (_below_peak(logits, logits) / temperature for logits in (student, teacher))
    return _kl(_log_probs(teacher), _log_probs(student))


def weighted_sum(tckd: Tensor, nckd: Tensor, alpha: float, beta: float) -> Tensor:
    """α·TCKD + β·NCKD, where a weight of 0 removes its term even if that is infinite; always part of the graph."""
    terms = [weight * term for weight, term in ((alpha, tckd), (beta, nckd)) if weight != 0]
    return sum(terms[1:], terms[0]) if terms else tckd.masked_fill(torch.ones_like(tckd, dtype=torch.bool), 0.0)


def unusable_teacher_rows(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) booleans: the teacher's row holds NaN or +inf, or no finite non-target logit."""
    index = labels.unsqueeze(1)
    target = teacher_logits.gather(1, index).squeeze(1)
    best_other = teacher_logits.scatter(1, index, -math.inf).amax(1)
    return ~best_other.isfinite() | target.isnan() | (target == math.inf)


def student_masks_mass(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(N,) booleans: the student masks (-inf) a class to which the teacher gives mass, so that KL is infinite."""
    return ((student_logits == -math.inf) & (teacher_logits > -math.inf)).any(1)


def _same_precision(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    return student_logits.to(dtype), teacher_logits.detach().to(dtype)


def _split_at_target(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-odds of the target (N,), and log-probabilities among the other classes (N, C), -inf at the target."""
    target = labels.unsqueeze(1)
    others = logits.scatter(1, target, -math.inf)
    target_logits = _below_peak(logits.gather(1, target), others) / temperature
    others = _below_peak(others, others) / temperature
    return (target_logits.squeeze(1) - others.logsumexp(1)), _log_probs(others)


def _below_peak(logits: Tensor, row: Tensor) -> Tensor:
    # Before dividing by T, so that large logits close to each other keep their difference to the last digit.
    return logits - row.amax(1, keepdim=True).detach()


def _log_probs(logits: Tensor) -> Tensor:
    # Not log_softmax, whose float32 sum over a large vocabulary loses digits on a CPU.
    return logits - logits.logsumexp(1, keepdim=True)


def _binary_log_probs(odds: Tensor) -> Tensor:
    # logsigmoid, never the log of a softmax: both probabilities keep their digits however confident the model is.
    return torch.stack((logsigmoid(odds), logsigmoid(-odds)), dim=1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # A class without mass contributes 0, also where both logarithms are -inf and their difference is NaN.
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction == "mean":
        return rows.sum() / max(len(rows), 1)
    raise ValueError(f'reduction is {reduction!r}; expected "mean", "sum" or "none".')


_STUDENT_MASKS_MASS = (
    "The student masks (-inf) a class to which the teacher gives mass, so that the divergence is infinite. Mask the "
    "class in the teacher's logits too, or leave it unmasked in the student's."
)


def _check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    shapes = f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}"
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(f"Expected logits of one shape (rows, classes); got {shapes}.")
    if student_logits.shape[1] < 2:
        raise ValueError(f"Distillation needs at least two classes; got {shapes}.")
    if not (student_logits.is_floating_point() and teacher_logits.is_floating_point()):
        raise ValueError(f"Expected floating logits; got {student_logits.dtype} and {teacher_logits.dtype}.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0.")


def _checked_labels(labels: Tensor, shape: torch.Size) -> Tensor:
    if labels.shape != shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected ({shape[0]},), one for each row of logits."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}; expected class indices of an integer type, such as torch.int64.")
    return labels.long()


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} is {weight}; expected a finite number, 0 or above.")


def _raise_on_bad_values(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
    num_classes = student_logits.shape[1]
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(f"label {labels[outside][0].item()} is outside [0, {num_classes}), the range of the classes.")
    if student_masks_mass(student_logits, teacher_logits).any():
        raise ValueError(_STUDENT_MASKS_MASS)
    masked = teacher_logits.scatter(1, labels.unsqueeze(1), -math.inf).amax(1) == -math.inf
    if masked.any():
        row = int(masked.nonzero()[0])
        raise ValueError(
            f"The teacher masks (-inf) every non-target class of row {row}, label {labels[row].item()}: NCKD needs at "
            "least one. Leave the row out with ignore_index."
        )
