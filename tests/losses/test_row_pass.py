"""The pass over rows: the numbers of the definition, any blocks, any memory, and rows that are masked, not chosen."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_dkd.losses import cpu_kernels, decoupled_kl, grouped_kl, row_pass
from hf_dkd.losses.row_pass import Partition, Weights
from hf_dkd.losses.row_pass import row_pass as pass_over
from tests.losses.row_pass_helpers import (
    CLASSES,
    INF,
    ROWS,
    WEIGHTS,
    assert_same,
    distilled,
    each_partition,
    each_weights,
    expected,
    groups_of,
    loss_of,
    passed,
    rows,
)
from tests.oracle import assert_within


@each_weights
@each_partition
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25, dtype=torch.float64)], ids=["number", "tensor"])
def test_terms_and_gradients_are_those_of_the_definition(
    weights: Weights, partition: Partition | None, scale: Tensor | float
) -> None:
    student, teacher, labels = rows()
    terms, gradient = passed(student, teacher, labels, weights, partition, scale=scale)
    loss, slope = expected(student, teacher, labels, weights, partition)
    assert_within(loss_of(terms, weights), loss, 1e-12 * (1 + loss))
    assert_within(gradient, 0.25 * slope, 1e-12 * 0.25 * slope.abs().amax(1, keepdim=True).clamp(min=1e-2))
    if partition is None:
        tckd, nckd = decoupled_kl(student, teacher, labels, temperature=weights.temperature)
        second = torch.zeros_like(tckd)
    else:
        groups = groups_of(teacher, partition)
        parts = grouped_kl(student, teacher, groups, temperature=weights.temperature, num_groups=3)
        tckd, (_, second, nckd) = parts.between, parts.within.unbind(1)
    ce = cross_entropy(student, labels, reduction="none") if weights.ce_weight else torch.zeros_like(tckd)
    for actual, wanted in zip(terms[:4], (ce, tckd, nckd, second), strict=True):
        assert actual.dtype == torch.float64
        assert_within(actual, wanted, 1e-12 * (1 + wanted))
    assert_within(terms.dkd, distilled(student, teacher, labels, weights, partition), 1e-12 * (1 + loss))
    assert terms.agrees.tolist() == (student.argmax(1) == teacher.argmax(1)).tolist()
    assert terms.fault.dtype == torch.uint8
    assert not terms.fault.any()


# --- Blocks and memory ---


@each_weights
@each_partition
@pytest.mark.parametrize("size", [1, 4])
def test_the_size_of_blocks_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, weights: Weights, partition: Partition | None, size: int
) -> None:
    student, teacher, labels = rows()
    labels[4] = -100
    student[6] *= 1e3
    for _ in range(2):
        whole = passed(student, teacher, labels, weights, partition)
        monkeypatch.setattr(cpu_kernels, "_BLOCK_BYTES", size * CLASSES * student.itemsize)
        blocks = passed(student, teacher, labels, weights, partition)
        assert_same((*blocks[0], blocks[1]), (*whole[0], whole[1]), 1e-13)
        monkeypatch.undo()
        labels[4] = 3


@each_partition
def test_ignored_rows_are_zero_whatever_they_hold(partition: Partition | None) -> None:
    student, teacher, labels = rows()
    kept = torch.tensor([True, False, True, True, False, False, True, True, False])
    labels = labels.masked_fill(~kept, -7)
    student[1], teacher[1] = math.nan, INF
    teacher[4] = -INF
    student[5, 2] = -INF
    weights = Weights(0.5, 2.0, 3.0, ce_weight=1.0)
    terms, gradient = passed(student, teacher, labels, weights, partition, ignore_index=-7)
    some = partition
    if partition is not None and partition.mixed is not None:
        some = partition._replace(mixed=partition.mixed[kept])
    alone, slope = passed(student[kept], teacher[kept], labels[kept], weights, some)
    for term, other in zip((*terms, gradient), (*alone, slope), strict=True):
        assert torch.equal(term[kept], other)
        assert not term[~kept].any()


@each_weights
def test_rows_may_lie_anywhere(weights: Weights) -> None:
    student, teacher, labels = rows()
    labels[3] = -100
    terms, gradient = passed(student, teacher, labels, weights)

    def columns_of_wider(logits: Tensor) -> Tensor:
        wider = torch.full((ROWS, CLASSES + 5), math.nan, dtype=logits.dtype)
        wider[:, 2:-3] = logits
        return wider[:, 2:-3]

    def column_major(logits: Tensor) -> Tensor:
        return logits.t().contiguous().t()

    for laid_out in (columns_of_wider, column_major):
        memory = laid_out(torch.full_like(student, math.nan))
        others = passed(laid_out(student), laid_out(teacher), labels, weights, gradient=memory)
        in_place = laid_out(student)
        pass_over(in_place, laid_out(teacher), labels, weights, gradient=in_place)
        assert_same((*others[0], memory, in_place), (*terms, gradient, gradient), 1e-14)
    expanded = passed(student, teacher[:1].expand(ROWS, CLASSES), labels[:1].expand(ROWS), weights)
    repeated = passed(student, teacher[:1].repeat(ROWS, 1), labels[:1].repeat(ROWS), weights)
    assert torch.equal(expanded[1], repeated[1])


# --- Elsewhere than on a CPU ---


class Elsewhere(Tensor):
    """Labels that say they are not on a CPU, so that rows are masked instead of chosen."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@each_weights
@each_partition
@pytest.mark.parametrize("size", [1, 4, 100])
def test_masked_rows_have_the_numbers_of_chosen_rows(
    monkeypatch: pytest.MonkeyPatch, weights: Weights, partition: Partition | None, size: int
) -> None:
    monkeypatch.setattr(row_pass, "_BLOCK_BYTES", dict.fromkeys(("cpu", "other"), size * CLASSES * 8))
    student, teacher, labels = rows()
    labels[[2, 5]] = -100
    student[2], teacher[5] = math.nan, INF
    teacher[2] = -INF
    student[7] *= 1e3
    # 0.1 is another number in float32.
    on_cpu, slope = passed(student, teacher, labels, weights, partition, scale=0.1)
    terms, gradient = passed(student, teacher, labels.as_subclass(Elsewhere), weights, partition, scale=0.1)
    assert_same((*terms, gradient), (*on_cpu, slope), 1e-13)
    assert not gradient[[2, 5]].any()
    nothing = pass_over(student, teacher, labels.as_subclass(Elsewhere), weights, partition)
    assert torch.equal(nothing.dkd, terms.dkd)


@each_partition
@pytest.mark.parametrize("count", [0, ROWS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nothing_is_read_from_a_device(partition: Partition | None, count: int, dtype: torch.dtype) -> None:
    logits = torch.empty(count, CLASSES, dtype=dtype, device="meta")
    labels = torch.empty(count, dtype=torch.long, device="meta")
    if partition is not None and partition.mixed is not None:
        partition = partition._replace(mixed=partition.mixed[:count].to("meta"))
    scale = torch.empty((), device="meta")
    terms = pass_over(logits, logits, labels, WEIGHTS[2], partition, scale=scale, gradient=torch.empty_like(logits))
    wide = torch.promote_types(dtype, torch.float32)
    assert [term.dtype for term in terms] == [wide] * 5 + [torch.bool, torch.uint8]
    assert {(term.shape, term.device.type) for term in terms} == {((count,), "meta")}
