"""Top k logits and a tail: TCKD exact, NCKD a lower bound that grows with k, and equal at k = C."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dkd.losses import TopOutputs, decoupled_kl, top_outputs, truncated_kl
from tests import oracle
from tests.oracle import assert_within, gradient_of


def draw(rows: int, classes: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def truncated(student: Tensor, teacher: Tensor, labels: Tensor, k: int, T: float = 1.0) -> tuple[Tensor, Tensor]:
    return truncated_kl(student, top_outputs(teacher, labels, k, temperature=T), labels, temperature=T)


def coarse(student: Tensor, teacher: Tensor, label: int, k: int, T: float) -> Tensor:
    """NCKD over the top k non-target classes and the sum of the others, of one row, from probabilities."""
    kept = [c for c in teacher.topk(k).indices.tolist() if c != label]
    others = [c for c in range(len(teacher)) if c != label and c not in kept]
    p, q = ((logits / T).softmax(0) for logits in (teacher, student))
    p, q = (torch.cat((values[kept], values[others].sum()[None])) for values in (p, q))
    p, q = p / p.sum(), q / q.sum()
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    classes=st.integers(2, 12), k=st.integers(1, 12), seed=st.integers(0, 10**6),
    T=st.sampled_from([0.5, 1.0, 4.0]), scale=st.sampled_from([0.1, 3.0, 20.0]),
)  # fmt: skip
def test_tckd_is_exact_and_nckd_a_lower_bound(classes: int, k: int, seed: int, T: float, scale: float) -> None:
    student, teacher, labels = draw(6, classes, seed, scale)
    k = min(k, classes)
    tckd, nckd = truncated(student, teacher, labels, k, T)
    exact_tckd, exact_nckd, _, _ = oracle.divergences(student, teacher, labels, T)
    assert_within(tckd, exact_tckd, 1e-12 * (1 + exact_tckd))
    expected = torch.stack([coarse(*row, k, T) for row in zip(student, teacher, labels.tolist(), strict=True)])
    assert_within(nckd, expected, 1e-12 * (1 + expected))
    assert (nckd <= exact_nckd + 1e-12 * (1 + exact_nckd)).all()
    assert (nckd >= -1e-15).all()
    if k == classes:
        assert_within(nckd, exact_nckd, 1e-12 * (1 + exact_nckd))


def test_the_gap_is_the_divergence_within_the_tail_and_falls_with_k() -> None:
    """By the chain rule it is the tail's mass among the non-target classes times KL among the tail's classes."""
    student, teacher, labels = draw(64, 100, seed=0)
    exact = decoupled_kl(student, teacher, labels)[1]
    gaps = []
    for k in (1, 4, 16, 64, 100):
        top = top_outputs(teacher, labels, k)
        gap = exact - truncated_kl(student, top, labels)[1]
        tail = torch.ones_like(teacher, dtype=torch.bool).scatter(1, top.indices, False)
        tail = tail.scatter(1, labels[:, None], False)
        p, q = (logits.masked_fill(~tail, -math.inf).log_softmax(1) for logits in (teacher, student))
        within = torch.where(tail, p.exp() * (p - q), 0.0).sum(1)
        others = teacher.scatter(1, labels[:, None], -math.inf)
        mass = (top.rest + teacher.amax(1) - others.logsumexp(1)).exp()
        assert_within(gap, torch.where(mass > 0, mass * within.nan_to_num(), 0.0), 1e-12)
        gaps.append(gap.mean().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1
    assert gaps[3] < 0.02
    assert gaps[4] == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_gradient_is_that_of_finite_differences(k: int) -> None:
    student, teacher, labels = draw(4, 8, seed=3)
    top = top_outputs(teacher, labels, k, temperature=2.0)
    leaf = student.clone().requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        tckd, nckd = truncated_kl(logits, top, labels, temperature=2.0)
        return tckd + 3 * nckd

    assert torch.autograd.gradcheck(loss, (leaf,), atol=1e-7)
    assert_within(gradient_of(loss, student).sum(1), 0.0, 1e-13)
    if k == 8:
        expected = oracle.dkd_gradient(student, teacher, labels, 1.0, 3.0, 2.0) / 4
        assert_within(gradient_of(loss, student), expected, 1e-13)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, labels = draw(16, 50, seed=4)
    half = student.half(), teacher.half()
    for got, expected in zip(
        truncated(*half, labels, 8), truncated(half[0].double(), half[1].double(), labels, 8), strict=True
    ):
        assert got.dtype == torch.float32
        assert_within(got, expected, 1e-5)


@pytest.mark.parametrize("who", ["both", "teacher"])
def test_masked_classes_count_for_nothing(who: str) -> None:
    student, teacher, labels = draw(5, 9, seed=5)
    labels = labels.clamp(max=6)
    masked = torch.arange(9) > 6
    teacher = teacher.masked_fill(masked, -math.inf)
    if who == "both":
        student = student.masked_fill(masked, -math.inf)
    for k in (2, 7, 9):
        tckd, nckd = truncated(student, teacher, labels, k)
        exact = decoupled_kl(student, teacher, labels)
        assert_within(tckd, exact[0], 1e-12)
        assert (nckd <= exact[1] + 1e-12).all()
        if k >= 7:
            assert_within(nckd, exact[1], 1e-12)
        assert gradient_of(lambda s, k=k: sum(truncated(s, teacher, labels, k)), student).isfinite().all()


def test_what_is_kept_has_the_mass_of_all_classes() -> None:
    _, teacher, labels = draw(10, 30, seed=6)
    top = top_outputs(teacher, labels, 4, temperature=2.0)
    in_top = (top.indices == labels[:, None]).any(1)
    parts = torch.cat((top.logits / 2, torch.where(in_top, -math.inf, top.target / 2)[:, None], top.rest[:, None]), 1)
    whole = ((teacher - teacher.amax(1, keepdim=True)) / 2).logsumexp(1)
    assert_within(parts.logsumexp(1), whole, 1e-13)
    assert (top.logits[:, 0] == 0).all()
    assert in_top.any(), "choose a seed that has the target in some top k, not in all"
    assert not in_top.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k of the top k is 0; expected 1 to 6"),
        ({"k": 7}, "k of the top k is 7"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_top_outputs_refuses(change: dict[str, Any], message: str) -> None:
    _, teacher, labels = draw(3, 6, seed=7)
    with pytest.raises(ValueError, match=message):
        top_outputs(teacher, labels, **{"k": 2, "temperature": 1.0, **change})


def test_truncated_kl_refuses_other_rows() -> None:
    student, teacher, labels = draw(3, 6, seed=8)
    top = top_outputs(teacher, labels, 2)
    with pytest.raises(ValueError, match=r"\(2, 6\), labels \(3,\) and the teacher's top \(3, 2\)"):
        truncated_kl(student[:2], top, labels)
    few = TopOutputs(torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.long), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="do not go together"):
        truncated_kl(student, few, labels)
