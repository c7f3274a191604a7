"""What the losses have in common: precision, stable logarithms, reduction, and the checks of their inputs."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

STUDENT_MASKS_MASS = (
    "The student masks (-inf) a class to which the teacher gives mass, so that the divergence is infinite. Mask the "
    "class in the teacher's logits too, or leave it unmasked in the student's."
)


def same_precision(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 where one of them is; the teacher's without a gradient."""
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    return student_logits.to(dtype), teacher_logits.detach().to(dtype)


def below_peak(logits: Tensor, row: Tensor) -> Tensor:
    """`logits` (N, …) less the largest of each `row` (N, C)."""
    # Before dividing by T, so that large logits close to each other keep their difference to the last digit.
    return logits - row.amax(1, keepdim=True).detach()


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities of each row, (N, C)."""
    # Not log_softmax, whose float32 sum over a large vocabulary loses digits on a CPU.
    return logits - logits.logsumexp(1, keepdim=True)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row of log-probabilities, (N, C), (N, C) → (N,)."""
    p = log_p.exp()
    # A class without mass contributes 0, also where both logarithms are -inf and their difference is NaN.
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)


def binary_kl(teacher_odds: Tensor, student_odds: Tensor) -> Tensor:
    """KL between the two-class distributions of given log-odds, (...) and (...) → (...)."""
    # logsigmoid, never the log of a softmax: both probabilities keep their digits however confident the model is.
    log_p, log_q = (
        torch.stack((logsigmoid(odds), logsigmoid(-odds)), dim=-1).flatten(0, -2)
        for odds in (teacher_odds, student_odds)
    )
    return kl(log_p, log_q).view_as(teacher_odds)


def student_masks_mass(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(N,) booleans: the student masks (-inf) a class to which the teacher gives mass, so that KL is infinite."""
    return ((student_logits == -math.inf) & (teacher_logits > -math.inf)).any(1)


def unusable_teacher_rows(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) booleans: the teacher's row holds NaN or +inf, or no finite non-target logit."""
    index = labels.unsqueeze(1)
    target = teacher_logits.gather(1, index).squeeze(1)
    best_other = teacher_logits.scatter(1, index, -math.inf).amax(1)
    return ~best_other.isfinite() | target.isnan() | (target == math.inf)


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """The `"mean"` of `rows` (0 of none), their `"sum"`, or with `"none"` themselves."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction == "mean":
        return rows.sum() / max(len(rows), 1)
    raise ValueError(f'reduction is {reduction!r}; expected "mean", "sum" or "none".')


def check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """Raise a `ValueError` for logits that are not floating (N, C), C ≥ 2, or a temperature that is not above 0."""
    shapes = f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}"
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(f"Expected logits of one shape (rows, classes); got {shapes}.")
    if student_logits.shape[1] < 2:
        raise ValueError(f"Distillation needs at least two classes; got {shapes}.")
    if not (student_logits.is_floating_point() and teacher_logits.is_floating_point()):
        raise ValueError(f"Expected floating logits; got {student_logits.dtype} and {teacher_logits.dtype}.")
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Raise a `ValueError` for a temperature that is not a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0.")


def check_weight(name: str, weight: float) -> None:
    """Raise a `ValueError` for a weight that is not a finite number of 0 or above."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name} is {weight}; expected a finite number, 0 or above.")


def checked_labels(labels: Tensor, shape: torch.Size) -> Tensor:
    """`labels` (N,) as int64; raise a `ValueError` where they are not integers, one for each row of logits."""
    if labels.shape != shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected ({shape[0]},), one for each row of logits."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}; expected class indices of an integer type, such as torch.int64.")
    return labels.long()


def check_range(labels: Tensor, num_classes: int, kept: Tensor | None = None) -> None:
    """Raise a `ValueError` for a label, of those that are `kept`, outside [0, num_classes); reads the device."""
    if not labels.numel():
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= num_classes:
        if kept is not None:
            check_range(labels[kept], num_classes)
            return
        wrong = low if low < 0 else high
        raise ValueError(f"label {wrong} is outside [0, {num_classes}), the range of the classes.")
