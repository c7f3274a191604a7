"""The decomposition where only the teacher's top k logits are known: all other classes count as one, the tail.

TCKD stays exact. NCKD becomes the divergence over the top k classes one by one and the tail as a whole, which is KL
again, of coarser distributions: by the data-processing inequality never above NCKD, and equal to it at k = C. (Dropping
the tail and renormalising, as is common, is a bound of nothing.) Dtypes and masked classes (-inf) as in `decoupled`.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import check_logits
from .decoupled import row_divergences

# A block of rows is about 1 MB of float32.
_BLOCK_NUMBERS = 2**18


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
    indices = teacher_logits.topk(k, dim=1).indices
    columns = torch.cat((indices, labels.unsqueeze(1)), dim=1)
    kept = _top_and_tail(teacher_logits.detach(), columns, temperature)
    peak = kept[:, :1]
    top, target, tail = (kept - peak).split((k, 1, 1), dim=1)
    return TopOutputs(top, indices, target.squeeze(1), tail.squeeze(1) / temperature)


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
    columns, repeated = kept_columns(top, labels)
    student = _top_and_tail(student_logits, columns, temperature, top.logits.dtype)
    teacher = teacher_rows(top, repeated, temperature, student.dtype)
    target = torch.full_like(labels, top.logits.shape[1])
    return row_divergences(student.masked_fill(repeated, -math.inf), teacher, target, temperature=temperature)


def kept_columns(top: TopOutputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of the top k and the target, (N, k + 1), and where among the k + 2 with the tail the target stands
    once more, (N, k + 2) booleans.
    """
    target = labels.unsqueeze(1)
    return torch.cat((top.indices, target), dim=1), torch.nn.functional.pad(top.indices == target, (0, 2))


def teacher_rows(top: TopOutputs, repeated: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """The teacher's logits of the top k, the target and the tail, (N, k + 2), -inf where the target is `repeated`.

    The tail's logit is T times the log-sum-exp of its logits over T.
    """
    parts = (top.logits, top.target.unsqueeze(1), temperature * top.rest.unsqueeze(1))
    return torch.cat([part.to(dtype) for part in parts], dim=1).masked_fill(repeated, -math.inf)


def _top_and_tail(logits: Tensor, columns: Tensor, temperature: float, dtype: torch.dtype = torch.float32) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(logits.dtype, dtype), torch.float32)
    return _TopAndTail.apply(logits, columns, temperature, dtype)


class _TopAndTail(torch.autograd.Function):
    """Rows of logits at some columns, and T times the log-sum-exp over T of their others: (N, m + 1).

    In blocks that stay in a CPU's cache, with the gradient written out: nothing of the size of the logits is made but
    the gradient itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        chosen, peaks, masses = [], [], []
        for rows, these in _blocks(logits, columns):
            chosen.append(logits[rows].gather(1, these).to(dtype))
            tail = logits[rows].to(dtype, copy=True).scatter_(1, these, -math.inf)
            peak = tail.amax(1, keepdim=True)
            # Of no class at all the log-sum-exp is -inf, and its gradient 0.
            peaks.append(peak.masked_fill(peak == -math.inf, 0.0))
            masses.append(tail.sub_(peaks[-1]).div_(temperature).exp_().sum(1, keepdim=True))
        peak, mass = torch.cat(peaks), torch.cat(masses)
        ctx.save_for_backward(logits, columns, peak, mass.clamp(min=torch.finfo(dtype).tiny))
        ctx.temperature = temperature
        return torch.cat((torch.cat(chosen), peak + temperature * mass.log()), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, peak, mass = ctx.saved_tensors
        of_logits, scale = torch.empty_like(logits), gradient[:, -1:] / mass
        for rows, these in _blocks(logits, columns):
            tail = logits[rows].to(gradient.dtype, copy=True).scatter_(1, these, -math.inf)
            tail.sub_(peak[rows]).div_(ctx.temperature).exp_().mul_(scale[rows])
            of_logits[rows] = tail.scatter_add_(1, these, gradient[rows, :-1]).to(logits.dtype)
        return of_logits, None, None, None


def _blocks(logits: Tensor, columns: Tensor) -> Iterable[tuple[slice, Tensor]]:
    count, on_cpu = len(logits), logits.device.type == "cpu"
    size = max(_BLOCK_NUMBERS // logits.shape[1], 1) if on_cpu else max(count, 1)
    return ((slice(start, start + size), columns[start : start + size]) for start in range(0, max(count, 1), size))
