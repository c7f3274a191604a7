"""The loss with its gradient made in the forward: its numbers and parts, its one backward, its memory, its refusals."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_dkd.losses import DKDOutput, chunked, chunked_dkd_loss, cpu_kernels, decoupled_kl, dkd_loss, kd_loss
from hf_dkd.losses.chunked import weighted_rows
from hf_dkd.losses.row_pass import TEACHER_UNUSABLE, Partition, Weights
from tests.losses.row_pass_helpers import (
    CLASSES,
    OPTIONS,
    PARTITIONS,
    ROWS,
    by_definition,
    each_reduction,
    expected,
    rows,
    some_ignored,
)
from tests.oracle import assert_within, gradient_of

# --- Values, parts and gradients ---


@each_reduction
def test_the_loss_and_its_gradient_are_those_of_the_definition(reduction: str) -> None:
    student, teacher, labels = some_ignored()
    loss = partial(chunked_dkd_loss, teacher_logits=teacher, labels=labels, reduction=reduction, **OPTIONS)
    assert_within(loss(student).loss, by_definition(student, teacher, labels, reduction), 1e-12)
    # A loss that is weighted row by row, or scaled, weighs its gradient.
    weight = torch.linspace(-1, 2, ROWS).double() if reduction == "none" else torch.tensor(2.5).double()
    slope = gradient_of(lambda leaf: weight * by_definition(leaf, teacher, labels, reduction), student)
    assert_within(gradient_of(lambda leaf: weight * loss(leaf).loss, student), slope, 1e-14)


@each_reduction
def test_the_parts_are_reduced_as_the_loss_is(reduction: str) -> None:
    student, teacher, labels = some_ignored()
    output = chunked_dkd_loss(student.requires_grad_(), teacher, labels, reduction=reduction, **OPTIONS)
    kept = labels != -100
    tckd, nckd = decoupled_kl(student[kept], teacher[kept], labels[kept], temperature=3.0)
    ce = cross_entropy(student[kept], labels[kept], reduction="none")
    agrees = (student.argmax(1) == teacher.argmax(1))[kept].double()
    for part, of_kept in zip(output[1:], (ce, tckd, nckd, agrees), strict=True):
        alone = torch.zeros(ROWS).double().masked_scatter(kept, of_kept.detach())
        reduced = {"none": alone, "sum": alone.sum(), "mean": alone.sum() / kept.sum()}[reduction]
        assert not part.requires_grad
        assert_within(part, reduced, 1e-13)
    assert output.loss.requires_grad
    dkd = 9 * (0.5 * output.tckd + 2 * output.nckd)
    assert_within(output.loss.detach(), 0.7 * output.ce + dkd, 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_cross_entropy_alone_is_that_of_torch(temperature: float) -> None:
    student, teacher, labels = some_ignored()
    loss = partial(chunked_dkd_loss, teacher_logits=teacher, labels=labels, alpha=0, beta=0, temperature=temperature)
    assert_within(loss(student, ce_weight=2.0).loss, 2 * cross_entropy(student, labels), 1e-13)
    slope = gradient_of(lambda leaf: 2 * cross_entropy(leaf, labels), student)
    assert_within(gradient_of(lambda leaf: loss(leaf, ce_weight=2.0).loss, student), slope, 1e-15)
    without = loss(student)
    assert without.loss == without.ce == 0
    assert not gradient_of(lambda leaf: loss(leaf).loss, student).any()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_classical_distillation_is_kd_loss(temperature: float) -> None:
    student, teacher, labels = rows()
    weights = Weights(1.0, 5.0, temperature, classical=True)
    kd = partial(kd_loss, teacher_logits=teacher, temperature=temperature, reduction="sum")
    assert_within(weighted_rows(student, teacher, labels, weights)[0], kd(student), 1e-12)
    slope = gradient_of(lambda leaf: weighted_rows(leaf, teacher, labels, weights)[0], student)
    assert_within(slope, gradient_of(kd, student), 1e-14)


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)])
def test_the_scale_is_a_number_or_a_tensor(partition: Partition | None, summed: bool, scale: Tensor | float) -> None:
    student, teacher, labels = rows()
    weights = Weights(0.5, 2.0, 3.0, ce_weight=0.7)
    loss, slope = expected(student, teacher, labels, weights, partition)
    options: dict[str, Any] = {"scale": scale, "summed": summed}
    actual = weighted_rows(student, teacher, labels, weights, partition, **options)[0]
    assert_within(actual, float(scale) * (loss.sum() if summed else loss), 1e-11)
    gradient = gradient_of(lambda leaf: weighted_rows(leaf, teacher, labels, weights, partition, **options)[0], student)
    assert_within(gradient, float(scale) * slope, 1e-13)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.permutations(range(ROWS)), st.integers(1, ROWS - 1))
def test_neither_order_nor_split_of_the_rows_matters(order: list[int], at: int) -> None:
    student, teacher, labels = some_ignored()
    loss = partial(chunked_dkd_loss, reduction="sum", **OPTIONS)
    whole = gradient_of(lambda leaf: loss(leaf, teacher, labels).loss, student)

    def in_parts(leaf: Tensor) -> Tensor:
        return sum(loss(leaf[part], teacher[part], labels[part]).loss for part in (order[:at], order[at:]))

    assert_within(in_parts(student), loss(student, teacher, labels).loss, 1e-12)
    assert_within(gradient_of(in_parts, student), whole, 1e-14)


# --- One backward ---


def test_a_second_backward_is_refused() -> None:
    student, teacher, labels = some_ignored()
    loss = chunked_dkd_loss(student.requires_grad_(), teacher, labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="A second backward through one DKD loss"):
        loss.backward()
    assert student.grad is not None
    assert_within(student.grad, gradient_of(lambda leaf: dkd_loss(leaf, teacher, labels), student), 1e-14)


def test_a_second_derivative_is_refused() -> None:
    student, teacher, labels = some_ignored()
    loss = chunked_dkd_loss(student.requires_grad_(), teacher, labels).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)
    # The refusal has given nothing away.
    (gradient,) = torch.autograd.grad(loss, student)
    assert_within(gradient, gradient_of(lambda leaf: dkd_loss(leaf, teacher, labels), student), 1e-14)


def test_gradients_accumulate_and_do_not_share_memory() -> None:
    student, teacher, labels = some_ignored()
    once = gradient_of(lambda leaf: chunked_dkd_loss(leaf, teacher, labels).loss, student)
    student.requires_grad_()
    first, second = (chunked_dkd_loss(student, teacher, labels).loss for _ in range(2))
    first.backward()
    (3 * second).backward()
    assert student.grad is not None
    assert_within(student.grad, 4 * once, 1e-14)


def test_no_gradient_flows_to_the_teacher() -> None:
    student, teacher, labels = some_ignored()
    teacher.requires_grad_()
    assert not chunked_dkd_loss(student, teacher, labels).loss.requires_grad
    chunked_dkd_loss(student.requires_grad_(), teacher, labels).loss.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("overwrite", [False, True])
def test_where_no_gradient_is_wanted_none_is_made(monkeypatch: pytest.MonkeyPatch, mode: type, overwrite: bool) -> None:
    monkeypatch.setattr(chunked, "empty", lambda *kind: pytest.fail("memory for a gradient"))
    student, teacher, labels = some_ignored()
    logits = student.clone().requires_grad_()
    with mode():
        output = chunked_dkd_loss(logits, teacher, labels, overwrite_student=overwrite, **OPTIONS)
    plain = chunked_dkd_loss(student, teacher, labels, overwrite_student=overwrite, **OPTIONS)
    for one, other in zip(output, plain, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
    assert torch.equal(logits, student)
    assert torch.equal(student, some_ignored()[0])


# --- Memory ---


def test_the_gradient_may_take_the_memory_of_the_student() -> None:
    student, teacher, labels = some_ignored()
    gradient = gradient_of(lambda leaf: chunked_dkd_loss(leaf, teacher, labels, **OPTIONS).loss, student)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    memory = logits.data_ptr()
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    chunked_dkd_loss(logits, teacher, labels, overwrite_student=True, **OPTIONS).loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, gradient)
    assert seen[0].data_ptr() == memory
    assert torch.equal(leaf, student)


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [2**22, 200])
def test_a_graph_that_needs_the_overwritten_logits_is_refused(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, dtype: torch.dtype, ignored: bool
) -> None:
    monkeypatch.setattr(cpu_kernels, "_BLOCK_BYTES", block_bytes)
    student, teacher, labels = some_ignored() if ignored else rows()
    student = student.to(dtype)
    logits = student.requires_grad_().tanh()
    loss = chunked_dkd_loss(logits, teacher, labels, overwrite_student=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = student * 1.0
    other = logits.square().sum()
    loss = chunked_dkd_loss(logits, teacher, labels, overwrite_student=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("layout", ["repeated", "one column", "overlapping", "columns", "transposed", "every other"])
def test_logits_of_any_layout_may_be_given_for_overwriting(layout: str, ignored: bool) -> None:
    _, teacher, labels = some_ignored() if ignored else rows()
    wider = torch.randn(2 * ROWS, 2 * CLASSES, generator=torch.Generator().manual_seed(0)).double().requires_grad_()

    def laid_out(leaf: Tensor) -> Tensor:
        leaf = leaf * 1.0
        return {
            "repeated": lambda: leaf[:1, :CLASSES].expand(ROWS, CLASSES),
            "one column": lambda: leaf[:ROWS, :1].expand(ROWS, CLASSES),
            "overlapping": lambda: leaf[0].as_strided((ROWS, CLASSES), (1, 1)),
            "columns": lambda: leaf[:ROWS, 3 : 3 + CLASSES],
            "transposed": lambda: leaf[:CLASSES, :ROWS].t(),
            "every other": lambda: leaf[::2, ::2],
        }[layout]()

    slope = gradient_of(lambda leaf: dkd_loss(laid_out(leaf), teacher, labels), wider)
    for overwrite in (False, True):
        loss = partial(chunked_dkd_loss, teacher_logits=teacher, labels=labels, overwrite_student=overwrite)
        assert_within(gradient_of(lambda leaf, loss=loss: loss(laid_out(leaf)).loss, wider), slope, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_memory_of_every_dtype_is_the_shape_of_the_logits(dtype: torch.dtype) -> None:
    for shape in ((0, 5), (1, 2), (3, 1001)):
        memory = chunked.empty(shape, dtype, torch.device("cpu"))
        assert (memory.shape, memory.dtype, memory.is_contiguous()) == (shape, dtype, True)
        memory.fill_(3)
        assert (memory == 3).all()


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_views_with_another_sign_are_read_with_it(which: str, overwrite: bool) -> None:
    student, teacher, labels = rows()
    slope = gradient_of(lambda leaf: dkd_loss(leaf, teacher, labels), student)

    def negated(logits: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(logits), -logits).conj().imag
        assert view.is_neg()
        return view

    if which != "student":
        teacher = negated(teacher)
    view = negated if which != "teacher" else (lambda leaf: leaf * 1)
    loss = partial(chunked_dkd_loss, teacher_logits=teacher, labels=labels, overwrite_student=overwrite)
    assert_within(gradient_of(lambda leaf: loss(view(leaf)).loss, student), slope, 1e-14)


def test_a_default_device_does_not_matter() -> None:
    student, teacher, labels = some_ignored()
    wanted = chunked_dkd_loss(student, teacher, labels, **OPTIONS)
    none = chunked_dkd_loss(student[:0], teacher[:0], labels[:0])
    with torch.device("meta"):
        for one, other in zip(chunked_dkd_loss(student, teacher, labels, **OPTIONS), wanted, strict=True):
            assert torch.equal(one, other)
        assert chunked_dkd_loss(student[:0], teacher[:0], labels[:0]) == none


def test_floating_point_errors_of_numpy_are_not_raised() -> None:
    student, teacher, labels = rows(scale=30.0, count=16, classes=1000)
    student, teacher = student.float(), teacher.float()
    with np.errstate(all="raise"):
        loss = chunked_dkd_loss(student, teacher, labels, temperature=0.1).loss
    wanted = dkd_loss(student.double(), teacher.double(), labels, temperature=0.1)
    assert_within(loss, wanted, 1e-5 * wanted)


# --- What is refused ---


def test_values_that_cannot_be_distilled_are_named() -> None:
    student, teacher, labels = some_ignored()
    teacher[3, 2] = math.nan
    with pytest.raises(ValueError, match="The teacher's row 3 cannot be distilled: NaN"):
        chunked_dkd_loss(student, teacher, labels)
    loss, terms = weighted_rows(student, teacher, labels, Weights(1.0, 1.0, 1.0))
    assert loss.isnan()
    assert terms.fault.tolist() == [TEACHER_UNUSABLE if row == 3 else 0 for row in range(ROWS)]
    student, teacher, labels = some_ignored()
    student[2, 5] = -math.inf
    with pytest.raises(ValueError, match=r"Row 2: The student masks \(-inf\) a class"):
        chunked_dkd_loss(student, teacher, labels)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_weight_of_cross_entropy_is_a_finite_number(value: float) -> None:
    with pytest.raises(ValueError, match=f"ce_weight is {value}"):
        chunked_dkd_loss(*rows(), ce_weight=value)


def test_rows_all_ignored_have_parts_of_zero() -> None:
    student, teacher = torch.full((2, 3, 5), math.nan)
    output = chunked_dkd_loss(student, teacher, torch.full((3,), -100), **OPTIONS)
    assert output == DKDOutput(*[torch.tensor(0.0)] * 5)


def test_on_a_device_nothing_is_read() -> None:
    student = torch.empty(4, 6, device="meta", dtype=torch.float16, requires_grad=True)
    labels = torch.empty(4, device="meta", dtype=torch.long)
    loss, terms = weighted_rows(student, student, labels, Weights(1.0, 1.0, 2.0), scale=torch.empty((), device="meta"))
    loss.backward()
    assert (loss.dtype, loss.shape, terms.dkd.shape) == (torch.float32, (), (4,))
    assert student.grad is not None
    assert (student.grad.dtype, student.grad.device.type) == (torch.float16, "meta")
