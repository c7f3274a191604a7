"""The loss at the edges of its domain: temperatures, confident models, masks, dtypes, ignored rows and refusals."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dkd.losses import chunked_dkd_loss, decoupled_kl, dkd_loss, kd_loss
from tests import oracle
from tests.oracle import assert_within, gradient_of, gradient_tolerance, non_target

INF = math.inf
LABELS = torch.tensor([0, 1, 2, 3])


def chunked(*args: Any, **options: Any) -> Tensor:
    return chunked_dkd_loss(*args, **options).loss


# Every public function as a number for each row of (student, teacher, labels).
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "decoupled_kl": lambda student, teacher, labels: sum(decoupled_kl(student, teacher, labels)),
    "dkd_loss": partial(dkd_loss, alpha=0.5, beta=2.0, temperature=2.0, reduction="none"),
    "chunked": partial(chunked, alpha=0.5, beta=2.0, temperature=2.0, reduction="none"),
    "kd_loss": lambda student, teacher, labels: kd_loss(student, teacher, temperature=2.0, reduction="none"),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_decoupled_loss = pytest.mark.parametrize("loss", [LOSSES["decoupled_kl"], LOSSES["dkd_loss"]])
each_dkd_loss = pytest.mark.parametrize("dkd", [dkd_loss, chunked], ids=["dkd_loss", "chunked"])


def pair(rows: int = 4, classes: int = 6, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Student and teacher logits, stacked: (2, rows, classes)."""
    generator = torch.Generator().manual_seed(7)
    return (scale * torch.randn(2, rows, classes, dtype=torch.float64, generator=generator)).to(dtype)


def column(logits: Tensor, index: int | Tensor, value: float) -> Tensor:
    """`logits` with `value` in one column, or in one column of each row."""
    return logits.scatter(1, torch.as_tensor(index).expand(len(logits))[:, None], value)


# --- Temperatures ---


def test_hot_models_differ_by_quadratic_forms() -> None:
    student, teacher = pair(classes=9)
    difference, T, C = teacher - student, 1e4, 9
    others = non_target(difference, LABELS)
    of_target = difference.gather(1, LABELS[:, None])[:, 0] - others.mean(1)
    tckd, nckd = (T**2 * part for part in decoupled_kl(student, teacher, LABELS, temperature=T))
    torch.testing.assert_close(tckd, (C - 1) / (2 * C**2) * of_target**2, rtol=5e-4, atol=1e-6)
    torch.testing.assert_close(nckd, others.var(1, correction=0) / 2, rtol=5e-4, atol=1e-6)
    kd = kd_loss(student, teacher, temperature=T, reduction="none")
    torch.testing.assert_close(kd, difference.var(1, correction=0) / 2, rtol=5e-4, atol=1e-6)


def test_cold_models_differ_by_the_margin_of_the_teachers_choice() -> None:
    student = torch.tensor([[0, 1, 2, 3, 4], [4, 0, 1, 2, 3], [2, 4, 3, 1, 0], [4, 2, 1, 3, 0]]).double()
    teacher = torch.tensor([[4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [0, 1, 4, 3, 2], [0, 1, 4, 2, 3]]).double()
    T = 0.01
    tckd, nckd = decoupled_kl(student, teacher, LABELS, temperature=T)
    kd = kd_loss(student, teacher, temperature=T, reduction="none")

    def margin(student: Tensor, teacher: Tensor) -> Tensor:
        return student.amax(1) - student.gather(1, teacher.argmax(1, keepdim=True))[:, 0]

    def target_and_best_other(logits: Tensor) -> Tensor:
        return torch.stack((logits.gather(1, LABELS[:, None])[:, 0], non_target(logits, LABELS).amax(1)), dim=1)

    assert_within(T * tckd, margin(target_and_best_other(student), target_and_best_other(teacher)), 1e-12)
    assert_within(T * nckd, margin(non_target(student, LABELS), non_target(teacher, LABELS)), 1e-12)
    assert_within(T * kd / T**2, margin(student, teacher), 1e-12)
    gradient = gradient_of(partial(dkd_loss, teacher_logits=teacher, labels=LABELS, temperature=T), student)
    expected = oracle.dkd_gradient(student, teacher, LABELS, temperature=T) / len(LABELS)
    assert_within(gradient, expected, gradient_tolerance(expected, 2 * T / len(LABELS)))


@each_dkd_loss
def test_cold_models_that_hardly_differ_are_those_of_the_paper(dkd: Callable[..., Tensor]) -> None:
    T = 0.01
    student, teacher = pair(scale=0.02)
    assert student.div(T).softmax(1).amax(1).max() < 0.99, "the rows are to be soft at this temperature"
    tckd, nckd = decoupled_kl(student, teacher, LABELS, temperature=T)
    kd = kd_loss(student, teacher, temperature=T, reduction="none") / T**2
    expected = oracle.divergences(student, teacher, LABELS, T)[:3]
    for part, expected_part in zip((tckd, nckd, kd), expected, strict=True):
        assert_within(part, expected_part, 1e-12)
    loss = partial(dkd, teacher_logits=teacher, labels=LABELS, temperature=T, reduction="none")
    assert_within(loss(student), oracle.dkd(student, teacher, LABELS, temperature=T), 1e-12 * T**2)
    gradient = gradient_of(lambda leaf: oracle.dkd(leaf, teacher, LABELS, temperature=T), student)
    assert_within(gradient_of(loss, student), gradient, 1e-12 * gradient.abs().amax(1, keepdim=True))


# --- Confident models ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confident_teacher_leaves_nckd_as_it_is(dtype: torch.dtype) -> None:
    student, teacher = pair(dtype=dtype)
    confident = column(teacher, LABELS, 80.0)
    assert torch.equal(decoupled_kl(student, confident, LABELS)[1], decoupled_kl(student, teacher, LABELS)[1])
    assert_within(
        decoupled_kl(student, confident, LABELS)[1],
        oracle.divergences(student.double(), confident.double(), LABELS)[1],
        64 * torch.finfo(dtype).eps * 81,
    )


FAVOURS = ["nothing", "target", "anything but the target", "another class"]


def favour(logits: Tensor, what: str, gap: float, other: int) -> Tensor:
    """Logits with a gap at the target (up or down) or at another class."""
    if what == "nothing":
        return logits
    if what == "another class":
        return column(logits, (LABELS + other) % logits.shape[1], gap)
    return column(logits, LABELS, gap if what == "target" else -gap)


@each_dkd_loss
@pytest.mark.parametrize("teacher_favours", FAVOURS)
@pytest.mark.parametrize("student_favours", FAVOURS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "gap", "tolerance"),
    [(torch.float32, 120.0, 1e-4), (torch.bfloat16, 120.0, 2e-2), (torch.float16, 18.0, 1e-2)],
)
def test_wide_gaps_keep_their_values_and_gradients(
    dkd: Callable[..., Tensor],
    dtype: torch.dtype,
    gap: float,
    tolerance: float,
    temperature: float,
    student_favours: str,
    teacher_favours: str,
) -> None:
    student, teacher = pair(scale=temperature)
    student = favour(student, student_favours, gap * temperature, other=1).to(dtype)
    teacher = favour(teacher, teacher_favours, gap * temperature, other=2).to(dtype)
    loss = partial(dkd, teacher_logits=teacher, labels=LABELS, temperature=temperature, reduction="none")
    exact = student.double(), teacher.double(), LABELS

    expected = oracle.dkd(*exact, temperature=temperature)
    assert_within(loss(student), expected, tolerance * expected)
    *_, kd, _ = oracle.divergences(*exact, temperature)
    actual = kd_loss(student, teacher, temperature=temperature, reduction="none")
    assert_within(actual, temperature**2 * kd, tolerance * temperature**2 * (1 + kd))

    gradient = gradient_of(loss, student)
    assert gradient.dtype == dtype
    expected = oracle.dkd_gradient(*exact, temperature=temperature)
    assert_within(gradient, expected, tolerance * expected.abs().amax(1, keepdim=True))


@each_dkd_loss
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "gap", "tolerance"),
    [
        (torch.float32, 18.0, 1e-4),
        (torch.float32, 120.0, 1e-4),
        (torch.bfloat16, 120.0, 2e-2),
        (torch.float16, 18.0, 1e-2),
    ],
)
def test_two_models_confident_of_the_same_other_class_differ_by_rounding(
    dkd: Callable[..., Tensor], dtype: torch.dtype, gap: float, tolerance: float, temperature: float
) -> None:
    labels, alpha, beta = torch.arange(256) % 6, 0.5, 2.0
    student, teacher = pair(rows=256, scale=temperature)
    other = (labels + 1) % 6
    student, teacher = (column(logits, other, gap * temperature).to(dtype) for logits in (student, teacher))
    weighted = {"alpha": alpha, "beta": beta, "temperature": temperature}
    loss = partial(dkd, teacher_logits=teacher, labels=labels, reduction="none", **weighted)
    exact = student.double(), teacher.double(), labels
    # All terms are differences of probabilities near 0 or near 1. Nothing underflows, but a probability near 1 has an
    # absolute error of float32's eps, however small the exact difference of two of them.
    eps = torch.finfo(torch.float32).eps

    value_floor = 64 * eps * temperature**2
    expected = oracle.dkd(*exact, **weighted)
    assert_within(loss(student), expected, tolerance * expected + value_floor)
    kd = temperature**2 * oracle.divergences(*exact, temperature)[2]
    actual = kd_loss(student, teacher, temperature=temperature, reduction="none")
    assert_within(actual, kd, tolerance * kd + value_floor)

    gradient, expected = gradient_of(loss, student), oracle.dkd_gradient(*exact, **weighted)
    assert gradient.isfinite().all()
    floor = 2 * eps * temperature * (alpha + beta)
    assert_within(gradient, expected, tolerance * expected.abs().amax(1, keepdim=True) + floor)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("scale", [10.0, 1e3, 1e5])
def test_float32_of_a_teacher_torn_between_two_distant_classes(scale: float, temperature: float) -> None:
    # A rounding of the tied logits moves mass between classes that the student sets 2·scale apart.
    student, teacher = pair(rows=64, scale=scale / 3, dtype=torch.float32)
    teacher[:, 0] = scale + torch.linspace(0, 1, 64)
    teacher[:, 1] = scale + 0.5
    student[:, 0], student[:, 1] = scale, -scale
    for label in (0, 2):
        assert_rounded_only(student, teacher, torch.full((64,), label), temperature)


def test_float32_of_a_large_vocabulary() -> None:
    # Against a flat student the rounding of the normaliser, which log_softmax sums in float32, does not cancel.
    _, teacher = pair(rows=2, classes=1_000_000, scale=3.0, dtype=torch.float32)
    assert_rounded_only(torch.zeros_like(teacher), teacher, LABELS[:2], temperature=1.0)


def assert_rounded_only(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> None:
    """Float32 values within 64·eps·(1 + max|logit|/T) of the float64 values of the same inputs, row by row."""

    def parts(student: Tensor, teacher: Tensor) -> Tensor:
        kd = kd_loss(student, teacher, temperature=temperature, reduction="none") / temperature**2
        return torch.stack((*decoupled_kl(student, teacher, labels, temperature=temperature), kd))

    largest = torch.maximum(student.abs().amax(1), teacher.abs().amax(1)).double()
    bound = 64 * torch.finfo(torch.float32).eps * (1 + largest / temperature)
    expected = parts(student.double(), teacher.double())
    assert_within(parts(student, teacher), expected, bound)
    by_rows = chunked_dkd_loss(student, teacher, labels, temperature=temperature, reduction="none")
    assert_within(torch.stack((by_rows.tckd, by_rows.nckd)), expected[:2], bound)


# --- Masks: logits of -inf ---


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_both_mask_is_as_if_absent(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    student, teacher = pair(dtype=dtype)
    masked = column(student, 5, -INF), column(teacher, 5, -INF), LABELS
    dropped = student[:, :5], teacher[:, :5], LABELS
    rounding = 16 * torch.finfo(dtype).eps
    assert_within(loss(*masked), loss(*dropped), rounding)
    gradient = gradient_of(lambda leaf: loss(leaf, *masked[1:]), masked[0])
    expected = gradient_of(lambda leaf: loss(leaf, *dropped[1:]), dropped[0])
    assert_within(gradient[:, :5], expected, rounding)
    assert torch.equal(gradient[:, 5], torch.zeros(4, dtype=dtype))


@each_loss
@pytest.mark.parametrize("index", [5, LABELS], ids=["another class", "target"])
def test_a_class_that_the_teacher_masks_is_one_without_mass(loss: Callable[..., Tensor], index: int | Tensor) -> None:
    student, teacher = pair()
    masked, limit = column(teacher, index, -INF), column(teacher, index, -1e5)
    assert_within(loss(student, masked, LABELS), loss(student, limit, LABELS), 1e-14)
    gradients = [gradient_of(lambda leaf, given=given: loss(leaf, given, LABELS), student) for given in (masked, limit)]
    assert_within(gradients[0], gradients[1], 1e-14)


def test_a_masked_target_leaves_the_rest_to_learn() -> None:
    student, teacher = pair()
    masked_teacher, masked_student = column(teacher, LABELS, -INF), column(student, LABELS, -INF)
    tckd, nckd = decoupled_kl(student, masked_teacher, LABELS)
    assert_within(tckd, -non_target(student.softmax(1), LABELS).sum(1).log(), 1e-14)
    assert torch.equal(nckd, decoupled_kl(student, teacher, LABELS)[1])

    tckd, nckd = decoupled_kl(masked_student, masked_teacher, LABELS)
    assert torch.equal(tckd, torch.zeros_like(tckd))
    assert torch.equal(nckd, decoupled_kl(student, teacher, LABELS)[1])
    gradient = gradient_of(partial(dkd_loss, teacher_logits=masked_teacher, labels=LABELS), masked_student)
    assert torch.equal(gradient.gather(1, LABELS[:, None]), torch.zeros(4, 1, dtype=torch.float64))
    assert gradient.isfinite().all()


@each_loss
def test_a_class_that_only_the_student_masks_is_refused(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair()
    for row, masked in product(range(4), range(6)):
        hidden = student.clone()
        hidden[row, masked] = -INF
        with pytest.raises(ValueError, match="student masks"):
            loss(hidden, teacher, LABELS)


@each_decoupled_loss
def test_a_teacher_that_masks_all_but_the_target_is_refused(loss: Callable[..., Tensor]) -> None:
    student, teacher = pair()
    teacher[2] = column(torch.full((1, 6), -INF), 2, 1.0)
    with pytest.raises(ValueError, match="row 2, label 2"):
        loss(student, teacher, LABELS)


@each_loss
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_a_broken_model_is_not_a_loss_of_zero(loss: Callable[..., Tensor], broken: str, value: float) -> None:
    logits = dict(zip(("student", "teacher"), pair(), strict=True))
    logits[broken][1, 4] = value
    if loss is LOSSES["chunked"] and broken == "teacher":
        with pytest.raises(ValueError, match="The teacher's row 1 cannot be distilled"):
            loss(logits["student"], logits["teacher"], LABELS)
        return
    rows = loss(logits["student"], logits["teacher"], LABELS)
    assert not rows[1].isfinite()
    assert rows[[0, 2, 3]].isfinite().all()


# --- Weights of zero, two classes ---


def test_a_weight_of_zero_removes_its_term() -> None:
    student, teacher = pair(dtype=torch.float32)
    tckd, nckd = decoupled_kl(student, teacher, LABELS, temperature=0.5)
    loss = partial(dkd_loss, labels=LABELS, temperature=0.5, reduction="none")
    assert torch.equal(loss(student, teacher, alpha=0.0, beta=3.0), 0.25 * (3.0 * nckd))
    assert torch.equal(loss(student, teacher, alpha=3.0, beta=0.0), 0.25 * (3.0 * tckd))

    # ±3e38 / 0.5 is infinite in float32, and so are the terms that the weights remove.
    apart = column(student, LABELS, -3e38), column(teacher, LABELS, 3e38)
    assert decoupled_kl(*apart, LABELS, temperature=0.5)[0].isinf().all()
    assert torch.equal(loss(*apart, alpha=0.0), 0.25 * nckd)
    gradient = gradient_of(partial(loss, teacher_logits=apart[1], alpha=0.0), apart[0])
    assert torch.equal(gradient.gather(1, LABELS[:, None]), torch.zeros(4, 1))
    assert gradient.isfinite().all()

    apart = column(student, 5, -3e38), teacher
    assert decoupled_kl(*apart, LABELS, temperature=0.5)[1].isinf().all()
    assert torch.equal(loss(*apart, beta=0.0), 0.25 * decoupled_kl(*apart, LABELS, temperature=0.5)[0])
    assert gradient_of(partial(loss, teacher_logits=teacher, beta=0.0), apart[0]).isfinite().all()

    for logits in ((student, teacher), apart):
        nothing = partial(loss, teacher_logits=logits[1], alpha=0.0, beta=0.0)
        assert torch.equal(nothing(logits[0]), torch.zeros(4))
        assert torch.equal(gradient_of(nothing, logits[0]), torch.zeros(4, 6))


def test_two_classes_have_no_other_to_compare() -> None:
    (student, teacher), labels = pair(classes=2, scale=5.0), torch.tensor([0, 1, 0, 1])
    assert torch.equal(decoupled_kl(student, teacher, labels)[1], torch.zeros(4, dtype=torch.float64))
    loss = dkd_loss(student, teacher, labels, alpha=0.7, beta=8.0, temperature=2.0, reduction="none")
    assert_within(loss, 0.7 * kd_loss(student, teacher, temperature=2.0, reduction="none"), 1e-13)
