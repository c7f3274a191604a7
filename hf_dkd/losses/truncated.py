"""The decomposition where only the teacher's top k logits are known: all other classes count as one, the tail.

TCKD stays exact. NCKD becomes the divergence over the top k classes one by one and the tail as a whole, which is KL
again, of coarser distributions: by the data-processing inequality never above NCKD, and equal to it at k = C. (Dropping
the tail and renormalising, as is common, is a bound of nothing.) Dtypes and masked classes (-inf) as in `decoupled`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import check_logits, same_precision
from .decoupled import row_divergences


class TopOutputs(NamedTuple):
    """What is kept of the teacher's rows. Logits are less the largest of their row, so that they fit half precision."""

    logits: Tensor
    """(N, k): the largest ones, in falling order."""
    indices: Tensor
    """(N, k): their classes."""
    target: Tensor
    """(N,): the logit of the target class, which may be among the top k."""
    rest: Tensor
    """(N,): log-sum-exp, at temperature T, of the classes that are neither; -inf where there are none."""


def top_outputs(teacher_logits: Tensor, labels: Tensor, k: int, *, temperature: float = 1.0) -> TopOutputs:
    """The top k of each row, the target's own logit, and the exact mass of the rest.

    Args:
        teacher_logits: (N, C), any floating dtype.
        labels: (N,) integers in [0, C).
        k: 1 to C.
        temperature: T of the `rest`, which holds for this temperature alone.

    Returns:
        In float32, float64 for float64.

    Raises:
        ValueError: for a k or a temperature out of range.
    """
    check_logits(teacher_logits, teacher_logits, temperature)
    if not 1 <= k <= teacher_logits.shape[1]:
        raise ValueError(f"The k of the top k is {k}; expected 1 to {teacher_logits.shape[1]}, the number of classes.")
    logits = teacher_logits.detach().to(torch.promote_types(teacher_logits.dtype, torch.float32))
    top, indices = logits.topk(k, dim=1)
    peak = top[:, :1]
    target = logits.gather(1, labels.unsqueeze(1))
    tail = logits.scatter(1, indices, -math.inf).scatter(1, labels.unsqueeze(1), -math.inf)
    rest = ((tail - peak) / temperature).logsumexp(1)
    return TopOutputs(top - peak, indices, (target - peak).squeeze(1), rest)


def truncated_kl(
    student_logits: Tensor, top: TopOutputs, labels: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """TCKD, exact, and the lower bound of NCKD: `decoupled_kl` from what `top_outputs` keeps of the teacher.

    Args:
        student_logits: (N, C), any floating dtype.
        top: of the teacher, at the same `temperature`.
        labels: (N,) integers in [0, C).
        temperature: T > 0. The divergences are not multiplied by T².

    Returns:
        tckd, nckd: two (N,) tensors in nats, float32 (float64 where an input is float64).

    Raises:
        ValueError: for rows, classes or temperatures that do not go together.
    """
    check_logits(student_logits, student_logits, temperature)
    rows, classes = student_logits.shape
    if len(labels) != rows or len(top.logits) != rows or top.logits.shape[1] > classes:
        raise ValueError(
            f"Student logits {tuple(student_logits.shape)}, labels {tuple(labels.shape)} and the teacher's top "
            f"{tuple(top.logits.shape)} do not go together: expected (N, C), (N,) and (N, k), k up to C."
        )
    return row_divergences(*truncated_logits(student_logits, top, labels, temperature), temperature=temperature)


def truncated_logits(
    student_logits: Tensor, top: TopOutputs, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher over k + 2 classes and the label in them, without checks.

    The classes are the top k, the target, and the tail, whose logit is T times the log-sum-exp of its logits over T, so
    that every divergence at temperature T may be taken of these rows. The target's place among the top k is masked.

    Returns:
        (N, k + 2), (N, k + 2), and (N,): k, the place of the target.
    """
    student, teacher_top = same_precision(student_logits, top.logits)
    is_target = top.indices == labels.unsqueeze(1)
    columns = torch.cat((top.indices, labels.unsqueeze(1)), dim=1)
    of_student = _TopAndTail.apply(student, columns, temperature)
    of_teacher = (teacher_top, top.target.unsqueeze(1), temperature * top.rest.unsqueeze(1))
    # The target among the top k is out, but not in its own column and not in the tail's.
    out = torch.nn.functional.pad(is_target, (0, 2))
    return (
        of_student.masked_fill(out, -math.inf),
        torch.cat(of_teacher, dim=1).to(student).masked_fill(out, -math.inf),
        torch.full_like(labels, top.logits.shape[1]),
    )


class _TopAndTail(torch.autograd.Function):
    """Logits (N, C) at some columns (N, m), and T times the log-sum-exp over T of the others: (N, m + 1).

    Written out for its gradient, which needs one tensor of the size of the logits where autograd takes six.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, temperature: float) -> Tensor:
        tail = logits.scatter(1, columns, -math.inf)
        peak = tail.amax(1, keepdim=True)
        # Of no class at all the log-sum-exp is -inf, and its gradient 0.
        tail.sub_(peak.masked_fill(peak == -math.inf, 0.0)).div_(temperature).exp_()
        mass = tail.sum(1, keepdim=True)
        ctx.save_for_backward(tail.div_(mass.clamp(min=torch.finfo(mass.dtype).tiny)), columns)
        return torch.cat((logits.gather(1, columns), peak + temperature * mass.log()), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        tail, columns = ctx.saved_tensors
        return (gradient[:, -1:] * tail).scatter_add(1, columns, gradient[:, :-1].contiguous()), None, None
