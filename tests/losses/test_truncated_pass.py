"""The truncated loss and the cross-entropy from one pass, against `truncated_kl` and torch's cross-entropy."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_dkd.losses import TopOutputs, decoupled_kl, top_outputs, truncated_kl, truncated_pass
from hf_dkd.losses.row_pass import STUDENT_MASKS, TEACHER_UNUSABLE, Weights
from hf_dkd.losses.truncated_pass import weighted_top_rows
from tests.losses.row_pass_helpers import WEIGHTS, each_weights
from tests.oracle import assert_within, gradient_of

ROWS, CLASSES, SCALE = 12, 40, 0.25
POSITIONS = torch.tensor([0, 2, 3, 5, 6, 7, 8, 10])
EPS = torch.finfo(torch.float32).eps


def draw(k: int, temperature: float = 1.0, scale: float = 3.0) -> tuple[Tensor, TopOutputs, Tensor, Tensor]:
    """Student (ROWS, CLASSES), and of the rows at `POSITIONS` the teacher's top, labels and logits.

    The target is the teacher's best class, its second, or most likely none of the top k, by turns.
    """
    generator = torch.Generator().manual_seed(k)
    student, teacher = scale * torch.randn(2, ROWS, CLASSES, dtype=torch.float64, generator=generator)
    teacher, order = teacher[POSITIONS], teacher[POSITIONS].argsort(dim=1, descending=True)
    rows = torch.arange(len(POSITIONS))
    labels = order[rows, torch.tensor([0, 1, CLASSES - 1]).repeat(3)[: len(rows)]]
    return student, top_outputs(teacher, labels, k, temperature=temperature), labels, teacher


def two_passes(student: Tensor, top: TopOutputs, labels: Tensor, weights: Weights) -> Tensor:
    """The rows' losses by autograd."""
    alpha, beta, temperature, ce_weight, classical = weights
    rows = student.index_select(0, POSITIONS)
    tckd, nckd = truncated_kl(rows, top, labels, temperature=temperature)
    if classical:
        parts = torch.cat((top.logits / temperature, top.target[:, None] / temperature, top.rest[:, None]), dim=1)
        repeated = torch.nn.functional.pad(top.indices == labels[:, None], (0, 2))
        b = parts.masked_fill(repeated, -math.inf).softmax(1)[:, -2]
        dkd = alpha * (tckd + (1 - b) * nckd)
    else:
        dkd = alpha * tckd + beta * nckd
    return temperature**2 * dkd + (ce_weight or 0.0) * cross_entropy(rows, labels, reduction="none")


def one_pass(
    student: Tensor, top: TopOutputs, labels: Tensor, weights: Weights, scale: Tensor | float = SCALE
) -> Tensor:
    return weighted_top_rows(student, top, labels, POSITIONS, weights, scale=scale)[0]


@pytest.mark.parametrize("numbers", [1, 3 * CLASSES, 2**20])
@pytest.mark.parametrize("k", [1, 5, CLASSES - 1, CLASSES])
@each_weights
def test_loss_and_gradient_are_those_of_two_passes(
    weights: Weights, k: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of one row, of three, and of all."""
    monkeypatch.setitem(truncated_pass._BLOCK_NUMBERS, "cpu", numbers)
    monkeypatch.setattr(truncated_pass, "_LONG_ROW", 1 if numbers > 1 else 2 * CLASSES)
    student, top, labels, _ = draw(k, weights.temperature)
    expected = SCALE * two_passes(student, top, labels, weights).sum()
    assert_within(one_pass(student, top, labels, weights), expected, 1e-12 * (1 + expected))
    slope = gradient_of(lambda leaf: SCALE * two_passes(leaf, top, labels, weights), student)
    gradient = gradient_of(lambda leaf: one_pass(leaf, top, labels, weights), student)
    assert gradient.dtype == torch.float64
    assert_within(gradient, slope, 1e-12 * slope.abs().amax(1, keepdim=True).clamp(min=1e-3))
    others = torch.ones(ROWS, dtype=torch.bool).index_fill(0, POSITIONS, False)
    assert (gradient[others] == 0).all()


@pytest.mark.parametrize("weights", [WEIGHTS[2], WEIGHTS[4]])
@pytest.mark.parametrize("k", [5, CLASSES])
def test_the_terms_are_those_of_each_row(k: int, weights: Weights) -> None:
    student, top, labels, teacher = draw(k, weights.temperature)
    for leaf in (student, student.clone().requires_grad_()):
        terms = weighted_top_rows(leaf, top, labels, POSITIONS, weights)[1]
        rows = student[POSITIONS]
        tckd, nckd = truncated_kl(rows, top, labels, temperature=weights.temperature)
        assert_within(terms.tckd, tckd, 1e-12)
        assert_within(terms.nckd, nckd, 1e-12)
        assert_within(terms.ce, cross_entropy(rows, labels, reduction="none"), 1e-12)
        assert_within(terms.dkd, weights.temperature**2 * (weights.alpha * tckd + weights.beta * nckd), 1e-11)
        assert torch.equal(terms.agrees, rows.argmax(1) == teacher.argmax(1))
        assert not any(term.requires_grad for term in terms)
        assert not terms.fault.any()


@pytest.mark.parametrize("scale", [0.5, 8.0, 200.0])
@each_weights
def test_float32_is_within_the_bound_of_the_other_losses(weights: Weights, scale: float) -> None:
    student, top, labels, _ = draw(5, weights.temperature, scale)
    student, top = student.float(), TopOutputs(*(part.float() if part.is_floating_point() else part for part in top))
    wide = TopOutputs(*(part.double() if part.is_floating_point() else part for part in top))
    expected = SCALE * two_passes(student.double(), wide, labels, weights).sum()
    loss = one_pass(student, top, labels, weights)
    assert loss.dtype == torch.float32
    size = 64 * EPS * (1 + student.abs().max() / weights.temperature)
    largest = SCALE * len(labels) * weights.temperature**2 * (weights.alpha + weights.beta + (weights.ce_weight or 0))
    assert_within(loss, expected, size * (expected.abs() + largest))
    slope = gradient_of(lambda leaf: SCALE * two_passes(leaf, wide, labels, weights), student.double())
    gradient = gradient_of(lambda leaf: one_pass(leaf, top, labels, weights), student)
    reach = SCALE * weights.temperature * (weights.alpha + weights.beta) + SCALE * (weights.ce_weight or 0.0)
    assert_within(gradient, slope, size * slope.abs().amax(1, keepdim=True).clamp(min=reach))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    student, top, labels, _ = draw(5, 2.0)
    student, weights = student.to(dtype), Weights(1.0, 4.0, 2.0, 1.0)
    top = TopOutputs(*(part.half() if part.is_floating_point() else part for part in top))
    loss, terms = weighted_top_rows(student, top, labels, POSITIONS, weights)
    assert loss.dtype == terms.nckd.dtype == torch.float32
    wide = TopOutputs(*(part.double() if part.is_floating_point() else part for part in top))
    slope = gradient_of(lambda leaf: two_passes(leaf, wide, labels, weights), student.double())
    gradient = gradient_of(lambda leaf: one_pass(leaf, top, labels, weights, 1.0), student)
    assert gradient.dtype == dtype
    assert_within(gradient, slope, 2 * torch.finfo(dtype).eps * slope.abs().amax(1, keepdim=True))


def test_a_loss_scale_saves_the_small_numbers_of_float16() -> None:
    student, top, labels, _ = draw(5)
    weights, share = Weights(1.0, 1.0, 1.0, 1.0), 2.0**-14
    slope = gradient_of(lambda leaf: two_passes(leaf, top, labels, weights), student.half().double())
    gradient = gradient_of(lambda leaf: 2.0**14 * one_pass(leaf, top, labels, weights, share), student.half())
    assert_within(gradient, slope, 2e-3 * slope.abs() + 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_masked_classes_count_for_nothing(temperature: float) -> None:
    student, _, labels, teacher = draw(1)
    masked = torch.arange(CLASSES) >= CLASSES - 10
    labels = labels % 30
    student, teacher = student.masked_fill(masked, -math.inf), teacher.masked_fill(masked, -math.inf)
    weights = Weights(0.5, 2.0, temperature, 0.7)
    for k in (2, 30, CLASSES):
        top = top_outputs(teacher, labels, k, temperature=temperature)
        terms = weighted_top_rows(student, top, labels, POSITIONS, weights)[1]
        exact = decoupled_kl(student[POSITIONS], teacher, labels, temperature=temperature)
        assert_within(terms.tckd, exact[0], 1e-12)
        if k >= 30:
            assert_within(terms.nckd, exact[1], 1e-12)
        slope = gradient_of(lambda leaf, top=top: two_passes(leaf, top, labels, weights), student)
        gradient = gradient_of(lambda leaf, top=top: one_pass(leaf, top, labels, weights, 1.0), student)
        assert_within(gradient, slope, 1e-12)
        assert (gradient[:, masked] == 0).all()


def test_rows_at_fault_are_told() -> None:
    student, top, labels, _ = draw(5)
    top.logits[1, 2] = math.nan
    labels[3] = top.indices[3, 4]
    student[POSITIONS[3], top.indices[3, 0]] = -math.inf
    fault = weighted_top_rows(student, top, labels, POSITIONS, Weights(1.0, 1.0, 1.0))[1].fault
    assert fault.tolist() == [0, TEACHER_UNUSABLE, 0, STUDENT_MASKS, 0, 0, 0, 0]


def test_without_a_labelled_row_the_gradient_is_zero() -> None:
    student, top, labels, _ = draw(5)
    none = TopOutputs(*(part[:0] for part in top)), labels[:0], POSITIONS[:0]
    loss, terms = weighted_top_rows(student.requires_grad_(), *none, Weights(1.0, 1.0, 1.0, 1.0))
    loss.backward()
    assert loss == 0
    assert terms.ce.shape == (0,)
    assert torch.equal(student.grad, torch.zeros(ROWS, CLASSES, dtype=torch.float64))


def test_a_second_derivative_is_refused() -> None:
    student, top, labels, _ = draw(5)
    loss = one_pass(student.requires_grad_(), top, labels, Weights(1.0, 1.0, 1.0))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)
    torch.autograd.grad(loss, student, retain_graph=True)
    with pytest.raises(RuntimeError, match="A second backward"):
        loss.backward()
