"""Rows, weights and partitions for the tests of `row_pass`, and what it is to find, from the public losses."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_dkd.losses import dkd_loss, grouped_dkd_loss, kd_loss, mixed_groups, top_k_groups
from hf_dkd.losses.row_pass import Partition, RowTerms, Weights, row_pass
from tests.oracle import assert_within

INF, EPS = torch.inf, torch.finfo(torch.float32).eps
ROWS, CLASSES = 9, 11
IGNORED = torch.tensor([1, 4])
OPTIONS: dict[str, Any] = {"alpha": 0.5, "beta": 2.0, "temperature": 3.0, "ce_weight": 0.7}
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

WEIGHTS = [
    Weights(1.0, 1.0, 1.0),
    Weights(0.5, 8.0, 4.0),
    Weights(0.5, 2.0, 1.0, ce_weight=0.7),
    Weights(1.0, 0.0, 0.7, ce_weight=0.3),
    Weights(0.0, 2.0, 3.0, ce_weight=1.0),
    Weights(0.0, 0.0, 2.0),
    Weights(1.5, 9.0, 2.5, classical=True),
    Weights(0.5, 9.0, 1.0, ce_weight=1.0, classical=True),
]
each_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: "-".join(map(str, weights)))


def mixed_examples() -> Tensor:
    """(ROWS, CLASSES): one class of weight 1, or two of 0.3 and 0.7, by turns."""
    rows = torch.arange(ROWS)
    shares = torch.zeros(ROWS, CLASSES)
    shares[rows, (rows + 2) % CLASSES] = torch.where(rows % 2 == 0, 1.0, 0.7)
    shares[rows[1::2], rows[1::2]] = 0.3
    return shares


PARTITIONS = {
    "target and rest": None,
    "top 3": Partition(top_k=3),
    "top 3 with a second beta": Partition(top_k=3, second_beta=0.5),
    "mixed": Partition(mixed=mixed_examples()),
}
each_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)


def rows(scale: float = 3.0, count: int = ROWS, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = scale * torch.randn(2, count, classes, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(classes, (count,), generator=generator)


def some_ignored() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, labels = rows()
    return student, teacher, labels.index_fill(0, IGNORED, -100)


def by_definition(student: Tensor, teacher: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """The loss of `OPTIONS` from `dkd_loss` and torch's cross-entropy."""
    weighted = {name: value for name, value in OPTIONS.items() if name != "ce_weight"}
    ce = cross_entropy(student, labels, reduction=reduction)
    return 0.7 * ce + dkd_loss(student, teacher, labels, reduction=reduction, **weighted)


def passed(*arguments: Any, gradient: Tensor | None = None, **options: Any) -> tuple[RowTerms, Tensor]:
    """The terms and the gradient, written to memory that held NaN."""
    gradient = torch.full_like(arguments[0], torch.nan) if gradient is None else gradient
    return row_pass(*arguments, gradient=gradient, **options), gradient


def groups_of(teacher: Tensor, partition: Partition) -> Tensor:
    return top_k_groups(teacher, partition.top_k) if partition.top_k else mixed_groups(partition.mixed)


def distilled(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights, partition: Partition | None = None
) -> Tensor:
    """T²·(α·TCKD + β·NCKD) of each row from the public losses, for autograd."""
    alpha, beta, temperature, _, classical = weights
    options: dict[str, Any] = {"temperature": temperature, "reduction": "none"}
    if classical:
        return alpha * kd_loss(student, teacher, **options)
    if partition is None:
        return dkd_loss(student, teacher, labels, alpha=alpha, beta=beta, **options)
    betas = (0.0, partition.second_beta, beta)
    return grouped_dkd_loss(student, teacher, groups_of(teacher, partition), alpha=alpha, beta=betas, **options)


def expected(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Each row's loss and its gradient in float64, from the public losses and torch's cross-entropy."""
    student, teacher, labels, weights, *partition = arguments
    leaf = student.detach().double().requires_grad_()
    loss = distilled(leaf, teacher.double(), labels, weights, *partition)
    if weights.ce_weight:
        loss = loss + weights.ce_weight * cross_entropy(leaf, labels, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def loss_of(terms: RowTerms, weights: Weights) -> Tensor:
    return terms.dkd + weights.ce_weight * terms.ce if weights.ce_weight else terms.dkd


def assert_float32(student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> None:
    """Values within 64·eps·(1 + max|logit|/T)·(the terms' weights), gradients relative to the row's maximum.

    Where the models nearly agree, probabilities cancel in the gradient, each off by eps times its exponent.
    """
    terms, gradient = passed(student, teacher, labels, weights)
    loss, slope = expected(student, teacher, labels, weights)
    alpha, beta, temperature, _, classical = weights
    ce_weight = weights.ce_weight or 0.0
    logits = torch.stack((student, teacher))
    finite = logits.masked_fill(logits == -INF, 0.0).abs()
    rounding = EPS * (1 + finite.amax((0, 2)).double() / min(temperature, 1.0 if ce_weight else temperature))
    beta = 0.0 if classical else beta
    assert_within(loss_of(terms, weights), loss, 64 * rounding * (temperature**2 * (alpha + beta) + ce_weight))
    largest, size = slope.abs().amax(1, keepdim=True), temperature * (alpha + beta) + ce_weight
    assert_within(gradient, slope, rounding[:, None] * (64 * largest + 2 * size))


def assert_same(actual: Iterable[Tensor], wanted: Iterable[Tensor], tolerance: float) -> None:
    """Terms and gradients are equal within `tolerance`·(1 + their size), booleans and faults exactly."""
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == other.dtype
        assert_within(one, other.double(), tolerance * (1 + other.double().abs()))
