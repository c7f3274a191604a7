"""The objective on rows: sums over the labelled ones, shares of a step, running terms, and no wait for the device."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dkd import DKDArgumentsMixin
from hf_dkd.classes import Rows, aligned_rows
from hf_dkd.heads import Head
from hf_dkd.objective import (
    RunningTerms,
    cross_entropy_sum,
    distil,
    share_of_step,
    step_scale,
)
from hf_dkd.rows import rows_beside

from . import oracle

IGNORED = -100
METHODS = [
    {},
    {"dkd_alpha": 0.5, "dkd_beta": 4.0, "dkd_temperature": 4.0},
    {"distillation": "kd", "dkd_alpha": 0.5, "dkd_temperature": 2.0},
]
OPTIONS = [{"dkd_top_k": 3}, {"dkd_standardize": True}]


def some_rows() -> Rows:
    """Eight rows of five classes, the third and the last without a label."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(8, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 4, IGNORED, 1, 1, 2, 3, IGNORED])
    return Rows(student, teacher, labels)


# ---- Sums ----


@pytest.mark.parametrize("settings", METHODS)
def test_sums_are_the_oracles_over_the_labelled_rows(settings: dict) -> None:
    student, teacher, labels = some_rows()[:3]
    student.requires_grad_()
    share = distil(Rows(student, teacher, labels), DKDArgumentsMixin(**settings))
    kept, temperature = labels != IGNORED, settings.get("dkd_temperature", 1.0)
    alpha, beta = settings.get("dkd_alpha", 1.0), settings.get("dkd_beta", 1.0)
    tckd, nckd, kl, _ = oracle.divergences(student[kept].double(), teacher[kept].double(), labels[kept], temperature)
    rows = alpha * kl if "distillation" in settings else alpha * tckd + beta * nckd
    agree = (student[kept].argmax(1) == teacher[kept].argmax(1)).sum()
    expected = [temperature**2 * rows.sum(), tckd.sum(), nckd.sum(), agree]
    assert list(share.terms) == ["dkd", "tckd", "nckd", "teacher_agreement", "ce"]
    found = [value.item() for value in share.terms.values()]
    assert found == pytest.approx([*(value.item() for value in expected), 0], rel=1e-5)
    assert share.loss.item() == share.terms["dkd"].item()
    assert not any(value.requires_grad for value in share.terms.values())
    (gradient,) = torch.autograd.grad(share.loss, student)
    assert gradient[~kept].eq(0).all()
    assert gradient[kept].abs().amax(1).gt(0).all()


def test_top_k_sums_are_the_oracles_over_the_teachers_ranking() -> None:
    student, teacher, labels = some_rows()[:3]
    kept = labels != IGNORED
    settings = {"dkd_alpha": 0.5, "dkd_beta": 4.0, "dkd_top_k": 3, "dkd_top_k_beta": 2.0, "dkd_temperature": 2.0}
    sums = distil(Rows(student, teacher, labels), DKDArgumentsMixin(**settings)).terms
    ranks = teacher[kept].argsort(1, descending=True).argsort(1)
    groups = torch.where(ranks == 0, 0, torch.where(ranks < 3, 1, 2))
    between, within, _ = oracle.grouped(student[kept].double(), teacher[kept].double(), groups, 3, 2.0)
    assert sums["tckd"].item() == pytest.approx(between.sum().item(), rel=1e-5)
    assert sums["top_k"].item() == pytest.approx(within[:, 1].sum().item(), rel=1e-5)
    assert sums["nckd"].item() == pytest.approx(within[:, 2].sum().item(), rel=1e-5)
    expected = 4 * (0.5 * between + 2 * within[:, 1] + 4 * within[:, 2]).sum()
    assert sums["dkd"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [*METHODS, OPTIONS[0]])
def test_standardised_sums_are_those_of_the_z_scores(settings: dict) -> None:
    student, teacher, labels = some_rows()[:3]
    z_scores = ((one - one.mean(1, keepdim=True)) / one.std(1, keepdim=True) for one in (student, teacher))
    expected = distil(Rows(*z_scores, labels), DKDArgumentsMixin(**settings)).terms
    found = distil(Rows(student, teacher, labels), DKDArgumentsMixin(**settings, dkd_standardize=True))
    assert {name: value.item() for name, value in found.terms.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )


def test_the_rows_of_an_example_count_by_their_mean() -> None:
    student, teacher, labels = some_rows()[:3]
    whole = distil(Rows(student, teacher, labels), DKDArgumentsMixin()).terms
    halves = distil(Rows(student, teacher, labels, per_example=2), DKDArgumentsMixin()).terms
    for name, value in whole.items():
        assert halves[name].item() == pytest.approx(value.item() / 2)


def test_agreement_is_that_of_the_models_where_z_scores_tell_none() -> None:
    masked = [-math.inf, -math.inf]
    rows = Rows(torch.tensor([[1.0, 2.0, *masked]]), torch.tensor([[2.0, 1.0, *masked]]), torch.tensor([0]))
    assert distil(rows, DKDArgumentsMixin(dkd_standardize=True)).terms["teacher_agreement"] == 0


def test_a_fault_in_a_row_without_a_label_is_none() -> None:
    student, teacher, labels = some_rows()[:3]
    teacher[7], student[6, 0] = math.nan, -math.inf
    teacher[1, 2] = math.inf
    rows = Rows(student, teacher, labels)
    share = distil(rows, DKDArgumentsMixin())
    assert share.unusable_teacher.nonzero().flatten().tolist() == [1]
    assert share.masking_student.nonzero().flatten().tolist() == [6]


def test_a_mean_over_no_rows_is_a_share_of_exactly_zero() -> None:
    mean = torch.tensor(math.nan, requires_grad=True)
    share = share_of_step(mean, torch.tensor(0), step_scale(torch.tensor(6), 2))
    assert share.item() == 0
    assert share.requires_grad
    assert share_of_step(torch.tensor(1.5), torch.tensor(4), step_scale(torch.tensor(6), 2)).item() == 2
    assert step_scale(torch.tensor(0), 2) == step_scale(0, 2) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cross_entropy_is_summed_over_labelled_rows_in_fp32_or_more(dtype: torch.dtype) -> None:
    student, _, labels = some_rows()[:3]
    logits = student.to(dtype)
    loss = cross_entropy_sum(logits.reshape(2, 4, 5), labels.reshape(2, 4))
    kept = labels != IGNORED
    expected = -logits.double().log_softmax(1)[kept, labels[kept]].sum()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# ---- Running terms ----


def test_running_terms_are_sums_until_they_are_drained() -> None:
    terms = RunningTerms()
    assert not terms
    terms.add({"ce": torch.tensor(1.5), "rows": torch.tensor(2)})
    terms.add({"ce": torch.tensor(0.25), "rows": torch.tensor(3)})
    assert terms
    assert terms.drain(Accelerator(cpu=True)) == {"ce": 1.75, "rows": 5}
    assert not terms


def test_a_step_that_does_not_count_adds_the_mean_of_those_before() -> None:
    terms, nan = RunningTerms(), torch.tensor(math.nan)
    for step, value in enumerate((torch.tensor(1.0), torch.tensor(2.0), nan)):
        terms.add({"ce": value}, value.isfinite(), steps=step)
    # As Trainer: the sum so far over 1 + the steps since the last log.
    assert terms.drain(Accelerator(cpu=True)) == {"ce": 3 + 3 / 3}
    terms.add({"ce": nan}, nan.isfinite())
    assert terms.drain(Accelerator(cpu=True)) == {"ce": 0}


# ---- Nothing is read from the device ----


class ScalarReads(TorchDispatchMode):
    """Counts the scalars that are read from their device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_running_terms_are_read_only_when_drained() -> None:
    terms, reads = RunningTerms(), ScalarReads()
    with reads:
        for value in (1.0, 2.0, 4.0):
            terms.add({"ce": torch.tensor(value, requires_grad=True), "rows": torch.tensor(3)}, torch.tensor(True))
    assert reads.count == 0
    with reads:
        assert torch.tensor(1.0).item() == 1
    assert reads.count == 1


@pytest.mark.parametrize("settings", [*METHODS, *OPTIONS])
@pytest.mark.parametrize(
    ("head", "shape", "rows", "mixed"),
    [
        (Head.CLASSIFICATION, (8,), 8, False),
        (Head.CLASSIFICATION, (8,), 8, True),
        (Head.QUESTION_ANSWERING, (2, 8), 16, False),
        (Head.TOKEN_CLASSIFICATION, (8, 12), 96, False),
    ],
)
def test_from_logits_to_running_terms_nothing_is_read(
    head: Head, shape: tuple[int, ...], rows: int, mixed: bool, settings: dict
) -> None:
    # Tensors of the meta device have a shape but no values: an operation that needs one raises.
    with torch.device("meta"):
        student, teacher = torch.randn(*shape, 12, requires_grad=True), torch.randn(*shape, 12)
        labels, visible, order = torch.zeros(shape, dtype=torch.long), torch.ones(8, 12), torch.arange(12)
        loss, total = torch.ones(()), torch.ones((), dtype=torch.long)
        weights = torch.ones(rows, 12) if mixed else None
    visible = visible if head is Head.QUESTION_ANSWERING else None
    both = [
        rows_beside(labels, logits, whose, visible) for logits, whose in ((student, "student"), (teacher, "teacher"))
    ]
    aligned = aligned_rows(head, *both, labels.flatten(), order, weights)
    scale = step_scale(total, 2)
    share = distil(aligned, DKDArgumentsMixin(**settings), scale=scale)
    loss = share_of_step(loss, (labels != IGNORED).sum(), scale) + share.loss
    loss.backward()
    terms = RunningTerms()
    for step in range(2):
        terms.add(share.terms, loss.detach().isfinite(), steps=step)
    faults = share.unusable_teacher, share.masking_student
    found = (*aligned[:3], *share.terms.values(), *faults, loss, student.grad)
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert [tensor.shape for tensor in (*aligned[:3], *faults)] == [(rows, 12), (rows, 12), (rows,), (rows,), (rows,)]
    with pytest.raises(RuntimeError, match="meta"):
        terms.drain(Accelerator(cpu=True))
