"""The loss from hidden states and the weights of both heads: neither model's logits ever exist.

A language model's logits are hidden states times the head's weight, far larger than both. Here they are made for a
block of rows at a time, become the loss and its gradient (`row_pass`), and that becomes the gradient of hidden states
and weight. Rows without a label are left out before any product.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arithmetic import check_range, check_temperature, check_weight, checked_labels
from .chunked import DKDOutput, empty, given_away, raise_on_fault, reduced_output, share_of_rows, times_factor
from .row_pass import RowTerms, Weights, row_pass

# Logits of one model in a block: fewer slow the products down, more take memory.
_BLOCK_LOGITS = {"cpu": 12 * 2**20, "cuda": 2**27}


class LinearHead(NamedTuple):
    """How a model makes logits of hidden states (N, d): softcap·tanh(logit_scale·(hidden·weightᵀ + bias) / softcap)."""

    weight: Tensor
    """(C, d)."""
    bias: Tensor | None = None
    """(C,)."""
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, memory: Tensor | None = None) -> Tensor:
        """(N, d) → (N, C), in `memory` if there is some."""
        logits = torch.mm(hidden, self.weight.t(), out=memory)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


class _Gradients(NamedTuple):
    """Of the sum of the rows' losses; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def fused_linear_dkd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> DKDOutput:
    """`chunked_dkd_loss` of the logits softcap·tanh(logit_scale·(hidden·weightᵀ + bias) / softcap), which never exist.

    Gradients flow to the student's hidden states, weight and bias, where they require them. Products are made in the
    type of the hidden states (under autocast, in its type), the loss in float32 or more, the weight's gradient is added
    up in float32 or more.

    Args:
        student_hidden: (N, d_s).
        student_weight: (C, d_s).
        teacher_hidden: (N, d_t), of another width if need be; no gradient flows to the teacher.
        teacher_weight: (C, d_t). Where the two have different numbers of rows, as vocabularies with other padding, the
            rows at the end that only one has are left out of the distillation, not out of the cross-entropy.
        labels: (N,); rows with `ignore_index` are left out before any product.
        student_bias: (C,).
        student_logit_scale: the factor of Cohere's `logit_scale`, and the inverse of Granite's `logits_scaling`.
        student_softcap: Gemma's `final_logit_softcapping`.

    Other arguments, the output and the errors are those of `chunked_dkd_loss`.
    """
    student = LinearHead(student_weight, student_bias, student_logit_scale, student_softcap)
    teacher = LinearHead(teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f'reduction is {reduction!r}; expected "mean" or "sum": the gradients are made before a weight for each '
            "row could be known."
        )
    for name, weight in (("alpha", alpha), ("beta", beta), ("ce_weight", ce_weight)):
        check_weight(name, weight)
    check_temperature(temperature)
    _check_shapes("student", student_hidden, student)
    _check_shapes("teacher", teacher_hidden, teacher)
    labels = checked_labels(labels, student_hidden.shape)
    if len(teacher_hidden) != len(student_hidden):
        raise ValueError(
            f"The student has {len(student_hidden)} rows of hidden states and the teacher {len(teacher_hidden)}: "
            "expected the same positions of both."
        )
    kept = labels != ignore_index
    check_range(labels[kept], min(len(student_weight), len(teacher_weight)))
    scale = share_of_rows(kept, reduction, torch.promote_types(student_hidden.dtype, torch.float32))
    weights = Weights(alpha, beta, temperature, ce_weight or None)
    loss, terms = fused_rows(
        student_hidden, student, teacher_hidden, teacher, labels, weights, scale=scale, ignore_index=ignore_index
    )
    raise_on_fault(terms.fault)
    return reduced_output(loss, terms, scale, reduction)


def fused_rows(
    student_hidden: Tensor,
    student: LinearHead,
    teacher_hidden: Tensor,
    teacher: LinearHead,
    labels: Tensor,
    weights: Weights,
    *,
    scale: Tensor | float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, RowTerms]:
    """`fused_linear_dkd_loss` without its checks: scale·(sum of the rows' losses), and the terms of each row (N,).

    Finding the labelled rows reads the device once.
    """
    leaves = [student_hidden, student.weight, student.bias]
    if not torch.is_grad_enabled():  # which the function below would not see
        leaves = [None if leaf is None else leaf.detach() for leaf in leaves]
    loss, *terms = _FusedLinear.apply(
        *leaves,
        student,
        teacher_hidden,
        teacher,
        labels,
        weights,
        scale,
        ignore_index,
    )
    return loss, RowTerms(*terms)


class _FusedLinear(torch.autograd.Function):
    """Loss and gradients block by block in the forward; the backward gives the gradients away."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Any,
        student: LinearHead,
        teacher_hidden: Tensor,
        teacher: LinearHead,
        labels: Tensor,
        weights: Weights,
        scale: Tensor | float,
        ignore_index: int,
    ) -> tuple[Tensor, ...]:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradients = _Gradients(
            torch.zeros_like(hidden) if of_hidden else None,
            # In float32 at least: half precision would round away what each block adds.
            empty(weight.shape, torch.promote_types(weight.dtype, torch.float32), weight.device) if of_weight else None,
            torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32)) if of_bias else None,
        )
        dtypes = _product_dtype(hidden), _product_dtype(teacher_hidden)
        student, teacher = _in_dtype(student, dtypes[0]), _in_dtype(teacher, dtypes[1])
        kept = (labels != ignore_index).nonzero().squeeze(1)
        # In float16 the scale waits for the backward: a small one would round the products to 0.
        given = 1.0 if dtypes[0] == torch.float16 else scale
        found: list[RowTerms] = []
        with torch.autocast(hidden.device.type, enabled=False):
            size = _block_size(len(kept), len(weight), hidden.device.type)
            memory = [empty((size, len(half.weight)), half.weight.dtype, hidden.device) for half in (student, teacher)]
            for rows in kept.split(size):
                first = not found
                block = hidden[rows].to(dtypes[0]), teacher_hidden[rows].to(dtypes[1]), labels[rows]
                found.append(_block(*block, student, teacher, weights, given, gradients, rows, memory, first))
        terms = RowTerms(*(_at(rows, kept, labels) for rows in map(torch.cat, zip(*found, strict=True))))
        ctx.gradient, ctx.left, ctx.dtype = gradients, 1.0 if given is scale else scale, weight.dtype
        ctx.mark_non_differentiable(*terms)
        rows = weights.ce_weight * terms.ce + terms.dkd if weights.ce_weight else terms.dkd
        return scale * rows.sum(), *terms

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, *of_terms: Tensor) -> tuple[Tensor | None, ...]:
        factor = of_loss * ctx.left
        scaled = [None if gradient is None else times_factor(gradient, factor) for gradient in given_away(ctx)]
        hidden, *of_head = scaled
        return hidden, *(None if gradient is None else gradient.to(ctx.dtype) for gradient in of_head), *[None] * 7


def _block(
    hidden: Tensor,
    teacher_hidden: Tensor,
    labels: Tensor,
    student: LinearHead,
    teacher: LinearHead,
    weights: Weights,
    scale: Tensor | float,
    gradients: _Gradients,
    rows: Tensor,
    memory: list[Tensor],
    first: bool,
) -> RowTerms:
    """The terms of a block of rows (R,); their gradients are added to `gradients`, or written if it is the `first`."""
    number = len(rows)
    logits = student.logits(hidden, memory[0][:number])
    of_teacher = teacher.logits(teacher_hidden, memory[1][:number])
    shared = min(logits.shape[1], of_teacher.shape[1])
    wanted = any(gradient is not None for gradient in gradients)
    capped = logits.clone() if wanted and student.softcap is not None else None
    # Over all classes, also those that only the student has.
    log_p, ce_weight = None, weights.ce_weight
    if ce_weight is not None and shared < logits.shape[1]:
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        weights = weights._replace(ce_weight=None)
    student_part = logits[:, :shared]
    gradient = student_part if wanted else None
    terms = row_pass(student_part, of_teacher[:, :shared], labels, weights, scale=scale, gradient=gradient)
    if log_p is not None:
        terms = terms._replace(ce=-log_p.gather(1, labels.unsqueeze(1)).squeeze(1))
    if not wanted:
        return terms
    logits[:, shared:] = 0.0
    if log_p is not None and ce_weight:
        slope = log_p.exp_()
        slope[torch.arange(len(labels), device=labels.device), labels] -= 1
        logits.add_(slope.mul_(ce_weight * scale))
    if capped is not None and student.softcap is not None:
        logits.mul_(capped.div_(student.softcap).square_().neg_().add_(1))
    if student.logit_scale != 1:
        logits.mul_(student.logit_scale)
    if gradients.hidden is not None:
        gradients.hidden[rows] = (logits @ student.weight).to(gradients.hidden.dtype)
    if gradients.weight is not None:
        _add_product(gradients.weight, logits.t(), hidden, first)
    if gradients.bias is not None:
        gradients.bias.add_(logits.sum(0, dtype=gradients.bias.dtype))
    return terms


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if hidden.dtype in (torch.float16, torch.bfloat16):
        return hidden.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _in_dtype(head: LinearHead, dtype: torch.dtype) -> LinearHead:
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return head._replace(weight=head.weight.detach().to(dtype), bias=bias)


def _block_size(number: int, classes: int, device: str) -> int:
    """Rows of a block, so that blocks are about as large as each other."""
    most = max(1, _BLOCK_LOGITS.get(device, _BLOCK_LOGITS["cuda"]) // classes)
    return max(1, math.ceil(number / math.ceil(max(number, 1) / most)))


def _at(values: Tensor, kept: Tensor, labels: Tensor) -> Tensor:
    return values.new_zeros(labels.shape).index_copy_(0, kept, values)


def _check_shapes(whose: str, hidden: Tensor, head: LinearHead) -> None:
    shapes = f"hidden states {tuple(hidden.shape)}, weight {tuple(head.weight.shape)}"
    if hidden.ndim != 2 or head.weight.ndim != 2 or hidden.shape[1] != head.weight.shape[1] or len(head.weight) < 2:
        raise ValueError(
            f"The {whose} has {shapes}; expected (N, d) and (C, d), C of 2 or more: flatten the positions."
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"The {whose}'s bias has shape {tuple(head.bias.shape)} for {shapes}; expected (C,).")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"The {whose}'s softcap is {head.softcap}; expected a number above 0, or None.")
