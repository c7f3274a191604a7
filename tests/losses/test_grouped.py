"""The decomposition over any partition: the chain rule of KL, the two-group case, and hostile rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hf_dkd.losses import decoupled_kl, dkd_loss, grouped_dkd_loss, grouped_kl, kd_loss, mixed_groups, top_k_groups
from tests import oracle
from tests.oracle import assert_within, gradient_of

drawn = settings(deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn, magnitude: float = 100.0) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """Student, teacher, groups, their number and T."""
    rows, classes, number = draw(st.integers(1, 4)), draw(st.integers(2, 8)), draw(st.integers(1, 4))
    logits = arrays(np.float64, (rows, classes), elements=st.floats(-magnitude, magnitude))
    groups = arrays(np.int64, (rows, classes), elements=st.integers(0, number - 1))
    student, teacher, groups = (torch.from_numpy(draw(array)) for array in (logits, logits, groups))
    return student, teacher, groups, number, draw(st.floats(0.5, 20.0))


def normal(rows: int, classes: int, groups: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    student, teacher = scale * torch.randn(2, rows, classes, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(groups, (rows, classes), generator=generator)


def target_groups(labels: Tensor, classes: int) -> Tensor:
    """Group 0 is the target, group 1 all others."""
    return (torch.arange(classes) != labels[:, None]).long()


@drawn
@given(cases())
def test_kl_is_that_between_groups_plus_masses_times_those_within(case: Any) -> None:
    student, teacher, groups, number, temperature = case
    parts = grouped_kl(student, teacher, groups, temperature=temperature, num_groups=number)
    kl = kd_loss(student, teacher, temperature=temperature, reduction="none") / temperature**2
    scale = 1 + torch.maximum(student.abs().amax(1), teacher.abs().amax(1)) / temperature
    assert_within(parts.between + (parts.masses * parts.within).sum(1), kl, 1e-12 * (scale + kl))
    assert_within(parts.masses.sum(1), 1.0, 1e-12)
    assert (parts.between >= -1e-12).all()
    assert (parts.within >= -1e-12).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("classes", "number"), [(2, 2), (5, 3), (40, 4)])
def test_values_and_gradients_are_the_oracles(classes: int, number: int, temperature: float) -> None:
    student, teacher, groups = normal(16, classes, number)
    expected = oracle.grouped(student, teacher, groups, number, temperature)
    actual = grouped_kl(student, teacher, groups, temperature=temperature, num_groups=number)
    for one, other in zip(actual, expected, strict=True):
        assert_within(one, other, 1e-12 * (1 + other))

    betas = [0.5, 2.0, 0.0, 8.0][:number]

    def by_hand(leaf: Tensor) -> Tensor:
        between, within, _ = oracle.grouped(leaf, teacher, groups, number, temperature)
        return temperature**2 * (0.5 * between + (within * torch.tensor(betas)).sum(1))

    weights: dict[str, Any] = {"alpha": 0.5, "beta": betas, "temperature": temperature, "reduction": "none"}
    loss = grouped_dkd_loss(student, teacher, groups, **weights)
    assert_within(loss, by_hand(student), 1e-12 * (1 + by_hand(student)))
    gradient = gradient_of(lambda leaf: grouped_dkd_loss(leaf, teacher, groups, **weights), student)
    expected_gradient = gradient_of(by_hand, student)
    tolerance = oracle.gradient_tolerance(expected_gradient, temperature * (0.5 + sum(betas)))
    assert_within(gradient, expected_gradient, 2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_target_and_rest_are_the_two_group_case(dtype: torch.dtype, scale: float) -> None:
    student, teacher, _ = normal(64, 10, 2, scale)
    student, teacher, labels = student.to(dtype), teacher.to(dtype), torch.arange(64) % 10
    groups = target_groups(labels, 10)
    tckd, nckd = decoupled_kl(student, teacher, labels, temperature=2.0)
    parts = grouped_kl(student, teacher, groups, temperature=2.0)
    assert parts.between.dtype == tckd.dtype
    assert torch.equal(parts.between, tckd)
    assert torch.equal(parts.within[:, 1], nckd)
    assert not parts.within[:, 0].any()

    weights: dict[str, Any] = {"alpha": 0.5, "beta": 8.0, "temperature": 2.0}
    grouped = gradient_of(lambda leaf: grouped_dkd_loss(leaf, teacher, groups, **weights), student)
    assert_within(grouped, gradient_of(lambda leaf: dkd_loss(leaf, teacher, labels, **weights), student).double(), 1e-6)


def test_one_group_of_everything_is_classical_distillation() -> None:
    student, teacher, _ = normal(8, 5, 1)
    parts = grouped_kl(student, teacher, torch.zeros(8, 5, dtype=torch.long))
    assert not parts.between.any()
    assert torch.equal(parts.within[:, 0], kd_loss(student, teacher, reduction="none"))


def test_a_group_for_each_class_is_all_between() -> None:
    student, teacher, _ = normal(8, 5, 1)
    parts = grouped_kl(student, teacher, torch.arange(5).expand(8, 5))
    assert_within(parts.between, kd_loss(student, teacher, reduction="none"), 1e-13)
    assert not parts.within.any()


def test_groups_may_be_empty_and_differ_between_rows() -> None:
    student, teacher, _ = normal(3, 4, 1)
    groups = torch.tensor([[0, 1, 2, 2], [0, 2, 2, 2], [2, 2, 2, 2]])
    parts = grouped_kl(student, teacher, groups, num_groups=4)
    assert parts.masses[1, 1] == parts.masses[0, 3] == 0
    assert parts.masses[2].tolist() == [0, 0, 1, 0]
    alone = [grouped_kl(student[row : row + 1], teacher[row : row + 1], groups[row : row + 1]) for row in range(3)]
    assert torch.equal(parts.between, torch.cat([one.between for one in alone]))
    weights: dict[str, Any] = {"alpha": 1.0, "beta": 2.0}
    assert gradient_of(lambda leaf: grouped_dkd_loss(leaf, teacher, groups, **weights), student).isfinite().all()


def test_masked_classes_count_for_nothing() -> None:
    student, teacher, groups = normal(8, 6, 3)
    groups[:, -2:] = 2
    kept = grouped_kl(student[:, :-2], teacher[:, :-2], groups[:, :-2], num_groups=3)
    for logits in (student, teacher):
        logits[:, -2:] = -math.inf
    masked = grouped_kl(student, teacher, groups, num_groups=3)
    for one, other in zip(masked, kept, strict=True):
        assert_within(one, other, 1e-14)
    gradient = gradient_of(lambda leaf: grouped_dkd_loss(leaf, teacher, groups, beta=[1.0, 2.0, 3.0]), student)
    assert gradient.isfinite().all()
    assert not gradient[:, -2:].any()


def test_a_weight_of_zero_removes_its_term() -> None:
    student, teacher, groups = normal(4, 6, 3)
    parts = grouped_kl(student, teacher, groups, num_groups=3)
    for alpha, betas in ((0.0, [1.0, 0.0, 2.0]), (2.0, [0.0, 0.0, 0.0])):
        loss = grouped_dkd_loss(student, teacher, groups, alpha=alpha, beta=betas, reduction="none")
        expected = alpha * parts.between + (parts.within * torch.tensor(betas)).sum(1)
        assert_within(loss, expected, 1e-13)
    leaf = student.clone().requires_grad_()
    grouped_dkd_loss(leaf, teacher, groups, alpha=0, beta=0).backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("gap", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_gaps_stay_finite(gap: float, dtype: torch.dtype) -> None:
    student, teacher = gap * torch.eye(6, dtype=dtype), gap * torch.eye(6, dtype=dtype).flip(0)
    groups = torch.tensor([0, 0, 1, 1, 2, 2]).expand(6, 6)
    for beta in (1.0, [0.5, 1.0, 2.0]):
        loss = grouped_dkd_loss(student, teacher, groups, beta=beta, reduction="none")
        expected = grouped_dkd_loss(student.double(), teacher.double(), groups, beta=beta, reduction="none")
        assert_within(loss, expected, 1e-6 * (1 + gap))
        gradient = gradient_of(lambda leaf, b=beta: grouped_dkd_loss(leaf, teacher, groups, beta=b), student)
        assert gradient.isfinite().all()


def test_it_compiles_with_the_number_of_groups() -> None:
    student, teacher, groups = normal(8, 6, 3)
    compiled = torch.compile(lambda s: grouped_kl(s, teacher, groups, num_groups=3).between, backend="eager")
    assert torch.equal(compiled(student), grouped_kl(student, teacher, groups, num_groups=3).between)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, groups = normal(4, 6, 3)
    teacher.requires_grad_()
    parts = grouped_kl(student, teacher, groups)
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": torch.zeros(4, 5, dtype=torch.long)}, r"groups are torch.int64 of shape \(4, 5\); expected"),
        ({"groups": torch.zeros(4, 6)}, r"groups are torch.float32"),
        ({"groups": torch.full((4, 6), -1)}, "groups go from -1 to -1; expected 0 or above"),
        ({"groups": torch.full((4, 6), 3), "num_groups": 3}, "groups go from 3 to 3; expected 0 to 2"),
        ({"temperature": 0.0}, "temperature is 0.0; expected"),
        ({"teacher_logits": torch.full((4, 6), -math.inf)}, "masks .-inf. every class of row 0"),
        ({"student_logits": torch.full((4, 6), -math.inf)}, "The student masks"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    student, teacher, groups = normal(4, 6, 3)
    given = {"student_logits": student, "teacher_logits": teacher, "groups": groups} | changes
    with pytest.raises(ValueError, match=message):
        grouped_kl(**given)


def test_weights_are_one_or_one_for_each_group() -> None:
    student, teacher, groups = normal(4, 6, 3)
    with pytest.raises(ValueError, match=r"groups go from 0 to 2; expected 0 to 1"):
        grouped_dkd_loss(student, teacher, groups, beta=[1.0, 2.0])
    with pytest.raises(ValueError, match="beta is -1"):
        grouped_dkd_loss(student, teacher, groups, beta=[1.0, -1.0, 1.0])


def test_top_k_groups_are_the_first_the_next_and_the_rest() -> None:
    teacher = torch.tensor([[0.1, 5.0, 3.0, 4.0, -1.0], [9.0, 8.0, 7.0, 6.0, 5.0]])
    assert top_k_groups(teacher, 3).tolist() == [[2, 0, 1, 1, 2], [0, 1, 1, 2, 2]]
    student, teacher, _ = normal(8, 6, 1)
    first = grouped_kl(student, teacher, top_k_groups(teacher, 1), num_groups=3)
    tckd, nckd = decoupled_kl(student, teacher, teacher.argmax(1))
    assert_within(first.between, tckd, 1e-14)
    assert_within(first.within, torch.stack((0 * nckd, 0 * nckd, nckd), dim=1), 1e-14)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 5"):
            top_k_groups(teacher, k)


def test_mixed_groups_are_the_two_classes_and_the_rest() -> None:
    weights = torch.tensor([[0.3, 0.0, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5]])
    groups = mixed_groups(weights)
    assert groups[0].tolist() == [1, 2, 0, 2]
    assert groups[1].tolist() == [2, 0, 2, 2]
    assert sorted(groups[2, [0, 3]].tolist()) == [0, 1]
    student, teacher, _ = normal(3, 4, 1)
    parts = grouped_kl(student, teacher, groups, num_groups=3)
    tckd, nckd = decoupled_kl(student[1:2], teacher[1:2], torch.tensor([1]))
    assert_within(parts.between[1:2], tckd, 1e-14)
    assert_within(parts.within[1], torch.stack((0 * nckd, 0 * nckd, nckd)).squeeze(1), 1e-14)
    assert not parts.within[:, :2].any()
