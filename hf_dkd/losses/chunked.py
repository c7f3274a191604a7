"""The loss of `decoupled` with its gradient made in the forward, a block of rows at a time: the trainer's default.

Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022 (arXiv 2203.08679). The same numbers up to rounding, in a
fraction of the time and memory: see `row_pass` and `benchmarks/RESULTS.md`.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arithmetic import STUDENT_MASKS_MASS, check_logits, check_range, check_weight, checked_labels
from .row_pass import STUDENT_MASKS, Partition, RowTerms, Weights, kinds_of_terms, row_pass, terms_dtype

# Bytes from which huge pages are worth asking for.
_HUGE = 2**22


class DKDOutput(NamedTuple):
    """A loss and its parts; only `loss` carries a gradient.

    With `reduction="mean"` all are means over the rows that are not ignored, with `"sum"` sums, with `"none"` (N,).
    """

    loss: Tensor
    """ce_weight·CE + T²·(α·TCKD + β·NCKD)."""
    ce: Tensor
    """Cross-entropy at the labels, at T = 1; 0 without a `ce_weight`."""
    tckd: Tensor
    nckd: Tensor
    agreement: Tensor
    """The share of rows (with `"sum"` their number) where both models choose the same class."""


def chunked_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    overwrite_student: bool = False,
) -> DKDOutput:
    """`dkd_loss`, and the cross-entropy too, with a gradient that is derived by hand and made in the forward.

    The arguments of `dkd_loss`, and

    Args:
        ce_weight: weight of the cross-entropy at the labels, ≥ 0.
        overwrite_student: the gradient may take the memory of `student_logits`, which then hold no logits any more and
            must not be the teacher's memory too. Rows that share memory among them are left as they are.

    Raises:
        ValueError: as `dkd_loss`, and for a teacher's row with NaN or +inf.
        RuntimeError: in a second backward through the same loss, or one with `create_graph=True`: there is no second
            derivative. (In `torch.compile`, a second backward is right, and torch refuses the second derivative.)
            `dkd_loss` has both, and forward-mode and `torch.func` derivatives, which there are none of here.
    """
    check_logits(student_logits, teacher_logits, temperature)
    for name, weight in (("alpha", alpha), ("beta", beta), ("ce_weight", ce_weight)):
        check_weight(name, weight)
    labels = checked_labels(labels, student_logits.shape)
    kept = labels != ignore_index
    if not torch.compiler.is_compiling():
        check_range(labels, student_logits.shape[1], kept)
    weights = Weights(alpha, beta, temperature, ce_weight or None)
    scale = share_of_rows(kept, reduction, terms_dtype(student_logits, teacher_logits))
    loss, terms = weighted_rows(
        student_logits,
        teacher_logits,
        labels,
        weights,
        scale=scale,
        summed=reduction != "none",
        ignore_index=ignore_index,
        overwrite_student=overwrite_student,
    )
    if not torch.compiler.is_compiling():
        raise_on_fault(terms.fault)
    return reduced_output(loss, terms, scale, reduction)


def weighted_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Weights,
    partition: Partition | None = None,
    *,
    scale: Tensor | float = 1.0,
    summed: bool = True,
    ignore_index: int = -100,
    overwrite_student: bool = False,
) -> tuple[Tensor, RowTerms]:
    """`chunked_dkd_loss` without its checks: scale·(sum of the rows' losses), or each row's, and the terms of each row.

    `scale` is a number or a scalar on the device, from which nothing is read.
    """
    wanted = student.requires_grad and torch.is_grad_enabled()
    gradient = None
    given = given_scale(student, scale, weights, partition)
    if torch.compiler.is_compiling() and partition is None:
        factor = torch.as_tensor(given, dtype=terms_dtype(student, teacher), device=student.device)
        numbers = [*weights[:3], weights.ce_weight or 0.0, weights.classical]
        *found, gradient = _row_pass_op(
            student.detach(), teacher.detach(), labels, numbers, factor, ignore_index, wanted
        )
        terms = RowTerms(*found)
    else:
        in_place = wanted and overwrite_student and _apart(student)
        if wanted:
            gradient = student.detach() if in_place else empty(student.shape, student.dtype, student.device)
        options: dict[str, Any] = {"ignore_index": ignore_index, "scale": given, "gradient": gradient}
        with torch.no_grad():
            terms = row_pass(student.detach(), teacher.detach(), labels, weights, partition, **options)
            if in_place:
                # NumPy has written there, which autograd did not see: a graph that needs the logits is to be refused.
                torch.autograd.graph.increment_version(student)
    return loss_with_gradient(student, terms, weights, gradient if wanted else None, scale, given, summed), terms


def given_scale(
    student: Tensor, scale: Tensor | float, weights: Weights, partition: Partition | None = None
) -> Tensor | float:
    """What the gradient is multiplied by when it is made: `scale`, but for float16 a power of two instead.

    In float16 the scale waits for the backward, whose factor may be a loss scale of thousands.
    """
    return _room_in_float16(weights, partition) if student.dtype == torch.float16 else scale


def loss_with_gradient(
    student: Tensor,
    terms: RowTerms,
    weights: Weights,
    gradient: Tensor | None,
    scale: Tensor | float,
    given: Tensor | float,
    summed: bool = True,
) -> Tensor:
    """scale·(sum of the rows' losses), or each row's, whose `gradient` is known but for the factor scale/given."""
    rows = weights.ce_weight * terms.ce + terms.dkd if weights.ce_weight else terms.dkd
    total = rows.sum() if summed else rows
    if gradient is None:
        return scale * total
    return _WithGradient.apply(student, total, scale, gradient, None if given is scale else scale / given)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known but for a factor that is `left`: the backward gives it away."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, total: Tensor, scale: Tensor | float, gradient: Tensor, left: Tensor | float | None
    ) -> Tensor:
        ctx.gradient, ctx.left = gradient, left
        return scale * total

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        factor = of_loss if ctx.left is None else of_loss * ctx.left
        if torch.compiler.is_compiling():
            return (ctx.gradient * factor.reshape(-1, 1)).to(ctx.gradient.dtype), None, None, None, None
        return times_factor(given_away(ctx), factor), None, None, None, None


def given_away(ctx: Any) -> Any:
    """What the forward left in `ctx.gradient`, which then is None; refuses a second time."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "This DKD loss has no second derivative, which create_graph=True asks for: its gradient is not a graph. "
            "Use hf_dkd.dkd_loss, which autograd differentiates."
        )
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        raise RuntimeError(
            "A second backward through one DKD loss: its gradient was given away by the first. Compute the loss again, "
            "or use hf_dkd.dkd_loss with retain_graph=True."
        )
    return gradient


def times_factor(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient` in place times `factor`, a scalar or one for each row of (N, C)."""
    if factor.device.type == "cpu" and not factor.ndim and factor.item() == 1:
        return gradient
    if factor.is_cuda and not factor.ndim and gradient.ndim == 2 and find_spec("triton") is not None:
        from .triton_kernels import scale_gradient_

        scale_gradient_(gradient, factor)
        return gradient
    # A scalar on a device would be rounded to float16 first, where 65,536 is infinite.
    return gradient.mul_(factor if gradient.ndim == 1 else factor.reshape(-1, 1))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < _HUGE:
        return torch.empty(shape, dtype=dtype, device=device)
    # NumPy asks the kernel for huge pages, without which the first touch of so much memory takes as long as the rest.
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(*shape)


def _room_in_float16(weights: Weights, partition: Partition | None) -> float:
    """A power of two, which leaves the gradients of rows their digits, and below which float16 still has them."""
    beta = weights.beta + (partition.second_beta if partition else 0.0)
    largest = weights.temperature * (weights.alpha + beta) + (weights.ce_weight or 0.0)
    return 2.0 ** math.floor(math.log2(2**15 / max(largest, 1.0)))


def _apart(rows: Tensor) -> bool:
    """Each row (N, C) has memory of its own: none is repeated, as `expand` does, or read with another sign."""
    return not rows.is_neg() and 0 < rows.shape[1] * rows.stride(1) <= rows.stride(0)


def share_of_rows(kept: Tensor, reduction: str, dtype: torch.dtype) -> Tensor | float:
    """What a sum over the rows that are `kept` (N,) is multiplied by in a `"mean"`, a `"sum"` or `"none"`."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; expected "mean", "sum" or "none".')
    if reduction != "mean":
        return 1.0
    if kept.device.type == "cpu" and not torch.compiler.is_compiling():
        return 1 / max(int(np.count_nonzero(kept.numpy())), 1)
    return kept.sum().clamp(min=1).to(dtype).reciprocal()


def reduced_output(loss: Tensor, terms: RowTerms, scale: Tensor | float, reduction: str) -> DKDOutput:
    """The terms of rows beside a loss that is already reduced."""
    parts = torch.stack((terms.ce, terms.tckd, terms.nckd, terms.agrees))
    return DKDOutput(loss, *(parts if reduction == "none" else parts.sum(1) * scale).unbind())


def raise_on_fault(fault: Tensor) -> None:
    """Raise a `ValueError` for the first row that `row_pass` found at fault; reads the device."""
    if not fault.any():
        return
    row = int(fault.nonzero()[0])
    if fault[row] == STUDENT_MASKS:
        raise ValueError(f"Row {row}: {STUDENT_MASKS_MASS}")
    raise ValueError(
        f"The teacher's row {row} cannot be distilled: NaN, +inf, or no finite non-target logit. Leave the row out "
        "with ignore_index, or check the teacher."
    )


@torch.library.custom_op("hf_dkd::row_pass", mutates_args=())
def _row_pass_op(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: list[float],
    scale: Tensor,
    ignore_index: int,
    wanted: bool,
) -> list[Tensor]:
    """`row_pass` as one opaque operator for `torch.compile`: the terms, and the gradient, empty where not wanted."""
    alpha, beta, temperature, ce_weight, classical = weights
    gradient = empty(student.shape if wanted else (0,), student.dtype, student.device)
    terms = row_pass(
        student,
        teacher,
        labels,
        Weights(alpha, beta, temperature, ce_weight or None, bool(classical)),
        scale=scale,
        ignore_index=ignore_index,
        gradient=gradient if wanted else None,
    )
    # Operators must not return views of one memory.
    return [*(term.clone() for term in terms), gradient]


@_row_pass_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: list[float],
    scale: Tensor,
    ignore_index: int,
    wanted: bool,
) -> list[Tensor]:
    kinds = kinds_of_terms(terms_dtype(student, teacher))
    gradient = student.new_empty(student.shape if wanted else (0,))
    return [torch.empty_like(labels, dtype=kind) for kind in kinds] + [gradient]
