"""The pass over rows at the edges: hostile float32, large vocabularies, wide gaps, masks and faults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_dkd.losses import cpu_kernels, kd_loss
from hf_dkd.losses.row_pass import STUDENT_MASKS, TEACHER_UNUSABLE, Partition, Weights
from hf_dkd.losses.row_pass import row_pass as pass_over
from tests import oracle
from tests.losses.row_pass_helpers import (
    CLASSES,
    EPS,
    INF,
    ROWS,
    WEIGHTS,
    assert_float32,
    assert_same,
    each_partition,
    each_weights,
    expected,
    loss_of,
    passed,
    rows,
)
from tests.oracle import assert_within


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_float32_of_hostile_rows(data: st.DataObject) -> None:
    count, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    values = st.sampled_from([0.0, 1e-30, 1.0, -3.0, 30.0, -50.0, 59.0, 61.0, 88.0, -104.0, 1e3, -1e4, 1e4 + 0.2, -INF])
    draw = arrays(np.float32, (count, classes), elements=values | st.floats(-100, 100, width=32))
    student, teacher = torch.from_numpy(data.draw(draw)), torch.from_numpy(data.draw(draw))
    # Only what both mask is left masked in the student, and one class that is not the target in the teacher.
    student = student.masked_fill((student == -INF) & (teacher > -INF), 0.0)
    labels = torch.from_numpy(data.draw(arrays(np.int64, count, elements=st.integers(0, classes - 1))))
    other = ((labels + 1) % classes)[:, None]
    student = torch.where(student.gather(1, other) == -INF, student.scatter(1, other, 1.0), student)
    teacher = torch.where(teacher.gather(1, other) == -INF, teacher.scatter(1, other, 2.0), teacher)
    weights = data.draw(st.sampled_from(WEIGHTS))
    if weights.ce_weight:  # infinite at a masked target, which the tests below look at
        student = torch.where(student == -INF, -20.0, student)
    assert_float32(student, teacher, labels, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS[1:3] + WEIGHTS[-2:])
def test_a_large_vocabulary_keeps_the_digits_of_float64(weights: Weights, dtype: torch.dtype) -> None:
    student, teacher, labels = rows(count=3, classes=151_936)
    student, teacher = student.to(dtype), teacher.to(dtype)
    teacher[0, labels[0]] = 25.0
    terms, gradient = passed(student, teacher, labels, weights)
    loss, slope = expected(student, teacher, labels, weights)
    assert_within(loss_of(terms, weights), loss, 64 * EPS * (1 + 25 / weights.temperature) * weights.temperature**2)
    rounding = max(64 * EPS, torch.finfo(dtype).eps)
    assert_within(gradient, slope, rounding * slope.abs().amax(1, keepdim=True) + torch.finfo(dtype).smallest_normal)
    if dtype == torch.float32:
        assert_float32(student, teacher, labels, weights)


def test_a_flat_student_of_a_large_vocabulary() -> None:
    # The rounding of a normaliser that is summed in float32 does not cancel here.
    _, teacher, labels = rows(count=2, classes=151_936)
    assert_float32(torch.zeros(2, 151_936), teacher.float(), labels, Weights(1.0, 1.0, 1.0, ce_weight=1.0))


def test_two_classes_have_no_nckd() -> None:
    student, teacher, labels = rows(classes=2)
    for dtype in (torch.float32, torch.float64):
        terms, _ = passed(student.to(dtype), teacher.to(dtype), labels, Weights(1.0, 8.0, 3.0))
        assert torch.equal(terms.nckd, torch.zeros(ROWS, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_at_distance_zero(dtype: torch.dtype) -> None:
    _, teacher, labels = rows(scale=20.0)
    teacher = teacher.to(dtype)
    for weights in (WEIGHTS[0], WEIGHTS[1], WEIGHTS[6]):
        terms, gradient = passed(teacher.clone(), teacher, labels, weights)
        assert not torch.stack((terms.tckd, terms.nckd, terms.dkd)).any()
        assert_within(gradient, 0.0, 4 * torch.finfo(dtype).eps * weights.temperature * weights.beta)
        assert terms.agrees.all()


# --- Wide rows, masks, faults ---


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("of_teacher", [-95.0, -62.0, -59.9, 3.0, 59.9, 62.0, 95.0])
@pytest.mark.parametrize("of_student", [-95.0, -62.0, -60.0, -59.9, 59.9, 60.0, 62.0, 95.0])
def test_both_sides_of_the_widest_odds_keep_their_digits(
    of_student: float, of_teacher: float, temperature: float
) -> None:
    student, teacher, labels = rows(scale=temperature)
    student, teacher = student.float(), teacher.float()
    others = [oracle.non_target(logits / temperature, labels).logsumexp(1) for logits in (student, teacher)]
    odds = of_student, of_teacher
    student, teacher = (
        logits.scatter(1, labels[:, None], (temperature * (of_target + rest))[:, None])
        for logits, of_target, rest in zip((student, teacher), odds, others, strict=True)
    )
    weights = Weights(1.0, 2.0, temperature)
    terms, gradient = passed(student, teacher, labels, weights)
    exact = student.double(), teacher.double(), labels, 1.0, 2.0, temperature
    assert_within(terms.dkd, oracle.dkd(*exact), 1e-4 * oracle.dkd(*exact))
    slope = oracle.dkd_gradient(*exact)
    assert_within(gradient, slope, 1e-5 * slope.abs().amax(1, keepdim=True))
    if of_student < 0 or of_student == of_teacher or 95.0 in odds:
        return
    # A confident student's smallest gradient, at a target that it holds with the probability 1 − e^−60.
    alone, of_target = Weights(1.0, 0.0, temperature), labels[:, None]
    slope = oracle.dkd_gradient(*exact[:3], 1.0, 0.0, temperature).gather(1, of_target)
    assert_within(passed(student, teacher, labels, alone)[1].gather(1, of_target), slope, 1e-4 * slope.abs())


@pytest.mark.parametrize("gap", [30.0, 59.0, 61.0, 90.0, 104.0, 130.0, 400.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("temperature", [0.5, 4.0, 20.0])
def test_cross_entropy_at_a_temperature_keeps_its_own_gaps(temperature: float, sign: int, gap: float) -> None:
    student, teacher, labels = rows()
    student, teacher = student.float(), teacher.float()
    student = student.scatter(1, labels[:, None], sign * gap)
    weights = Weights(0.0, 0.0, temperature, ce_weight=1.0)
    terms, gradient = passed(student, teacher, labels, weights)
    loss, slope = expected(student, teacher, labels, weights)
    assert_within(terms.ce, loss, 1e-5 * loss + 64 * EPS)
    assert_within(gradient, slope, 1e-4 * slope.abs().amax(1, keepdim=True) + EPS)
    assert_float32(student, teacher, labels, Weights(0.5, 2.0, temperature, ce_weight=1.0))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.3, 4.0])
@pytest.mark.parametrize("scale", [100.0, 1e3, 1e4])
def test_a_teacher_torn_between_others_that_the_student_sets_apart(scale: float, temperature: float) -> None:
    # With the target as high as the others its odds are small: what is large are the logits.
    student, teacher, labels = rows()
    student, teacher = student.float(), teacher.float()
    teacher = torch.cat((teacher[:, :4] + scale, teacher[:, 4:]), dim=1)
    student = torch.cat((student[:, :2] + scale, student[:, 2:]), dim=1)
    assert_float32(student, teacher, labels % 2, Weights(0.5, 8.0, temperature))


@pytest.mark.parametrize("constant", [-1e4, 300.0, 1e4])
def test_a_constant_in_the_logits_costs_no_digit_of_the_gradient(constant: float) -> None:
    student, teacher, labels = rows()
    student, teacher = (student * 16).round() / 16, (teacher * 16).round() / 16
    weights = Weights(0.5, 8.0, 3.0)
    moved = passed((student + constant).float(), (teacher + constant).float(), labels, weights)[1]
    slope = expected(student, teacher, labels, weights)[1]
    assert_within(moved, slope, 64 * EPS * slope.abs().amax(1, keepdim=True))


@each_weights
@pytest.mark.parametrize("gap", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_are_right_and_leave_the_others_alone(gap: float, weights: Weights, dtype: torch.dtype) -> None:
    student, teacher, labels = rows()
    student, teacher = student.to(dtype), teacher.to(dtype)
    plain = passed(student, teacher, labels, weights)
    student[1, labels[1]], teacher[4, labels[4]] = gap, -gap
    student[7], teacher[7] = gap * student[7], gap * teacher[7].flip(0)
    terms, gradient = passed(student, teacher, labels, weights)
    others = torch.tensor([0, 2, 3, 5, 6, 8])
    alone = (part[others] for part in (*plain[0], plain[1]))
    assert_same((part[others] for part in (*terms, gradient)), alone, 1e-6)
    assert gradient.isfinite().all()
    if dtype == torch.float32:
        assert_float32(student, teacher, labels, weights)


def test_a_teacher_without_mass_beside_the_target_has_its_kd() -> None:
    # 3e38 / 0.5 is infinite in float32: NCKD is, and counts for nothing.
    student = torch.tensor([[-1e3, 3e38, 60.0, 3e38]])
    teacher = torch.tensor([[62.0, 60.0, 50.0, 3e38]])
    terms, gradient = passed(student, teacher, torch.tensor([3]), Weights(1.0, 1.0, 0.5, classical=True))
    assert_within(terms.dkd, kd_loss(student, teacher, temperature=0.5, reduction="none").double(), 1e-6)
    assert_within(gradient, torch.tensor([[0.0, 0.25, 0.0, -0.25]]).double(), 1e-6)


@each_partition
def test_faults_are_named_row_by_row(partition: Partition | None) -> None:
    student, teacher, labels = rows()
    masked = (labels[3:4] + 1) % CLASSES
    teacher[0, labels[0]], teacher[1, (labels[1] + 1) % CLASSES] = math.nan, INF
    teacher[2] = teacher[2].masked_fill(torch.arange(CLASSES) != labels[2], -INF)
    student[3, masked] = -INF
    student[4, masked] = teacher[4, masked] = -INF
    teacher[5, masked] = -INF
    student[6, 0] = math.nan
    teacher[7] = math.nan
    labels[7] = -100
    terms, _ = passed(student, teacher, labels, Weights(1.0, 1.0, 2.0), partition)
    assert terms.fault.tolist() == [*[TEACHER_UNUSABLE] * 3, STUDENT_MASKS, 0, 0, 0, 0, 0]
    assert terms.dkd[6].isnan()
    assert terms.dkd[[4, 5, 7, 8]].isfinite().all()


@each_weights
@pytest.mark.parametrize("by_student", [True, False], ids=["both", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_classes_have_no_mass(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by_student: bool, weights: Weights
) -> None:
    student, teacher, labels = rows()
    padding = torch.full((ROWS, 3), -INF)
    student = torch.cat((student, padding if by_student else torch.zeros(ROWS, 3)), dim=1).to(dtype)
    teacher = torch.cat((teacher, padding), dim=1).to(dtype)
    alone = student[:, :CLASSES] if by_student else student
    limit = teacher[:, :CLASSES] if by_student else teacher.clamp(min=-1e4)
    wanted, slope = passed(alone, limit, labels, weights)
    monkeypatch.setattr(cpu_kernels, "rows_by_definition", lambda *_: pytest.fail("the slow way"))
    masked, gradient = passed(student, teacher, labels, weights)
    rounding = 64 * torch.finfo(dtype).eps
    assert_same((*masked, gradient[:, : slope.shape[1]]), (*wanted, slope), rounding)
    assert not masked.fault.any()
    assert not gradient[:, CLASSES:].any() or not by_student


def test_a_student_that_masks_what_is_left_of_a_teachers_mass_is_at_fault() -> None:
    student, teacher, labels = rows()
    teacher[2, 5], student[2, 5] = -1e5, -INF
    teacher[:, 6] = -INF
    labels[:] = 0
    terms, _ = passed(student, teacher, labels, Weights(1.0, 1.0, 1.0))
    assert terms.fault.tolist() == [STUDENT_MASKS if row == 2 else 0 for row in range(ROWS)]


def test_the_first_of_equal_logits_is_the_choice() -> None:
    student = torch.tensor([[1.0, 5.0, 5.0, 0.0], [5.0, 5.0, 0.0, 0.0], [-INF, 1.0, 1.0, 0.0]])
    teacher = torch.tensor([[0.0, 7.0, 1.0, 7.0], [0.0, 2.0, 1.0, 1.0], [-INF, 3.0, 3.0, 0.0]])
    terms = pass_over(student, teacher, torch.tensor([0, 1, 2]), Weights(1.0, 1.0, 1.0))
    assert terms.agrees.tolist() == [True, False, True]
