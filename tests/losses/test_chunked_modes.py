"""The loss with its gradient made in the forward: in half precision, under autocast and compiled."""

from functools import partial

import pytest
import torch
from torch import Tensor

from hf_dkd.losses import chunked_dkd_loss, dkd_loss
from hf_dkd.losses.chunked import weighted_rows
from hf_dkd.losses.row_pass import Partition, Weights
from tests.losses.row_pass_helpers import (
    CLASSES,
    IGNORED,
    OPTIONS,
    ROWS,
    by_definition,
    each_reduction,
    expected,
    rows,
    some_ignored,
)
from tests.oracle import assert_within, gradient_of

EPS = torch.finfo(torch.float32).eps


# --- Half precision and autocast ---


@each_reduction
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_rounded_once(dtype: torch.dtype, teacher_dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = some_ignored()
    student, teacher = student.to(dtype), teacher.to(teacher_dtype)
    slope = gradient_of(
        lambda leaf: by_definition(leaf.to(torch.float64), teacher, labels, reduction), student.double()
    )
    loss = partial(chunked_dkd_loss, teacher_logits=teacher, labels=labels, reduction=reduction, **OPTIONS)
    gradient = gradient_of(lambda leaf: loss(leaf).loss, student)
    assert gradient.dtype == dtype
    assert loss(student).loss.dtype == torch.promote_types(teacher_dtype, torch.float32)
    assert_within(gradient, slope, 2 * torch.finfo(dtype).eps * slope.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**10, 2.0**16])
def test_a_loss_scale_saves_the_small_numbers_of_float16(loss_scale: float, overwrite: bool) -> None:
    student, teacher, labels = rows(count=256, classes=4096, scale=1.0)
    student, teacher = student.half(), teacher.half()

    def scaled(leaf: Tensor) -> Tensor:
        return loss_scale * chunked_dkd_loss(leaf * 1, teacher, labels, overwrite_student=overwrite).loss

    gradient = gradient_of(scaled, student).double()
    slope = loss_scale * gradient_of(lambda leaf: dkd_loss(leaf, teacher, labels), student.double())
    half = torch.finfo(torch.float16)
    smallest = half.smallest_normal * half.eps
    assert_within(gradient, slope, 2 * half.eps * slope.abs() + smallest + EPS * slope.abs().max())


@pytest.mark.parametrize(
    "weights", [Weights(1e-4, 1e-4, 1.0), Weights(100.0, 800.0, 20.0, 1.0), Weights(0.0, 0.0, 1.0)]
)
def test_float16_holds_the_gradients_of_any_weights(weights: Weights) -> None:
    student, teacher, labels = rows(scale=8.0)
    student, teacher = student.half(), teacher.half()
    partition = Partition(top_k=3, second_beta=weights.beta)
    for groups in (None, partition):
        slope = expected(student, teacher, labels, weights, groups)[1]
        gradient = gradient_of(
            lambda leaf, groups=groups: weighted_rows(leaf, teacher, labels, weights, groups)[0], student
        )
        eps = torch.finfo(torch.float16).eps
        assert_within(gradient, slope, eps * slope.abs().amax(1, keepdim=True) + 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    student, teacher, labels = some_ignored()
    student, teacher = student.to(dtype), teacher.to(dtype)
    student[0] *= 1e3
    loss = partial(chunked_dkd_loss, teacher_logits=teacher, labels=labels, **OPTIONS)
    plain, gradient = loss(student), gradient_of(lambda leaf: loss(leaf).loss, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one, other in zip(loss(student), plain, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == dtype
        assert torch.equal(gradient_of(lambda leaf: loss(leaf).loss, student), gradient)


# --- torch.compile ---


@each_reduction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_compiled_in_one_graph_the_loss_is_the_same(dtype: torch.dtype, reduction: str) -> None:
    torch._dynamo.reset()
    student, teacher, labels = some_ignored()
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = partial(chunked_dkd_loss, reduction=reduction, **OPTIONS)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    rounding = 4 * torch.finfo(dtype).eps
    # The second batch has rows of another number, the third no labelled row, the fourth no row at all.
    for part in (slice(ROWS), slice(5), IGNORED, slice(0)):
        batch = teacher[part], labels[part]
        for one, other in zip(compiled(student[part], *batch), loss(student[part], *batch), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        slope = gradient_of(lambda leaf, batch=batch: loss(leaf, *batch).loss, student[part])
        gradient = gradient_of(lambda leaf, batch=batch: compiled(leaf, *batch).loss, student[part])
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, slope, rtol=0, atol=rounding)


@pytest.mark.parametrize("case", ["wide odds", "large logits", "masked target", "masked class", "two classes"])
def test_compiled_rows_that_take_the_definition_are_the_same(case: str) -> None:
    torch._dynamo.reset()
    student, teacher, labels = rows()
    temperature = 4.0
    if case == "wide odds":
        student[0, labels[0]], temperature = 90.0, 1.0
    elif case == "large logits":
        student[:, 3] = 600.0
    elif case == "masked target":
        teacher[0, labels[0]] = -torch.inf
    elif case == "masked class":
        other = (labels[0] + 1) % CLASSES
        student[0, other] = teacher[0, other] = -torch.inf
    else:
        student, teacher, labels = student[:, :2], teacher[:, :2], labels % 2
    loss = partial(chunked_dkd_loss, teacher_logits=teacher, labels=labels, temperature=temperature, ce_weight=0.5)
    compiled = torch.compile(lambda leaf: loss(leaf).loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(student), loss(student).loss)
    slope = gradient_of(lambda leaf: loss(leaf).loss, student)
    assert_within(gradient_of(compiled, student), slope, 1e-14 * slope.abs().max())


def test_compiled_for_any_shape_the_loss_is_the_same() -> None:
    torch._dynamo.reset()
    student, teacher, labels = some_ignored()

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> Tensor:
        return chunked_dkd_loss(student, teacher, labels, alpha=alpha, temperature=temperature).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows_of, alpha, temperature in ((slice(ROWS), 1.0, 4.0), (slice(5), 0.5, 2.0)):
        batch = teacher[rows_of], labels[rows_of], alpha, temperature
        assert torch.equal(compiled(student[rows_of], *batch), loss(student[rows_of], *batch))
        slope = gradient_of(lambda leaf, batch=batch: loss(leaf, *batch), student[rows_of])
        assert_within(gradient_of(lambda leaf, batch=batch: compiled(leaf, *batch), student[rows_of]), slope, 1e-14)


@pytest.mark.parametrize(
    ("partition", "scale"),
    [(None, 0.1), (None, torch.tensor(0.1)), (Partition(top_k=3), 0.1)],
    ids=["number", "tensor", "top 3"],
)
def test_compiled_the_rows_are_the_same(partition: Partition | None, scale: Tensor | float) -> None:
    torch._dynamo.reset()
    student, teacher, labels = some_ignored()
    loss = partial(weighted_rows, weights=Weights(1.0, 0.0, 2.0, classical=True), partition=partition, scale=scale)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=partition is None)
    assert torch.equal(compiled(student, teacher, labels)[0], loss(student, teacher, labels)[0])
    slope = gradient_of(lambda leaf: loss(leaf, teacher, labels)[0], student)
    assert_within(gradient_of(lambda leaf: compiled(leaf, teacher, labels)[0], student), slope, 1e-15)
