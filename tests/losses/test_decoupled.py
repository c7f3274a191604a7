"""The definition of the loss: the paper's numbers, the identities of its parts on drawn inputs, and its contract."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hf_dkd.losses import chunked_dkd_loss, decoupled_kl, dkd_loss, kd_loss
from tests import oracle
from tests.oracle import assert_within, gradient_of, gradient_tolerance, non_target

drawn = settings(deadline=None, derandomize=True)
Loss = Callable[..., Tensor]
temperatures = st.floats(0.5, 20.0)
weights = st.floats(0.1, 8.0)


def chunked(*args: Any, **options: Any) -> Tensor:
    return chunked_dkd_loss(*args, **options).loss


each_dkd_loss = pytest.mark.parametrize("dkd", [dkd_loss, chunked], ids=["dkd_loss", "chunked"])


class Case(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor
    temperature: float

    def scale(self) -> Tensor:
        """(N,): 1 + the largest |logit|/T of the row, the size of the numbers that are rounded on the way."""
        return 1 + torch.maximum(self.student.abs().amax(1), self.teacher.abs().amax(1)).double() / self.temperature

    def log_odds(self, logits: Tensor) -> Tensor:
        others = non_target(logits, self.labels) / self.temperature
        return logits.gather(1, self.labels[:, None])[:, 0] / self.temperature - others.logsumexp(1)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """TCKD, NCKD and KL, all without T²."""
        tckd, nckd = decoupled_kl(self.student, self.teacher, self.labels, temperature=self.temperature)
        kd = kd_loss(self.student, self.teacher, temperature=self.temperature, reduction="none")
        return tckd, nckd, kd / self.temperature**2


@st.composite
def cases(draw: st.DrawFn, magnitude: float = 100.0, min_classes: int = 2) -> Case:
    rows, classes = draw(st.integers(1, 4)), draw(st.integers(min_classes, 8))
    logits = arrays(np.float64, (rows, classes), elements=st.floats(-magnitude, magnitude))
    labels = arrays(np.int64, rows, elements=st.integers(0, classes - 1))
    student, teacher, labels = (torch.from_numpy(draw(array)) for array in (logits, logits, labels))
    return Case(student, teacher, labels, draw(temperatures))


def normal(rows: int, classes: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    student, teacher = scale * torch.randn(2, rows, classes, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


@each_dkd_loss
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_values_and_gradients_are_those_of_the_paper(dkd: Loss, classes: int, temperature: float) -> None:
    student, teacher, labels = normal(rows=32, classes=classes)
    case = Case(student, teacher, labels, temperature)
    for actual, expected in zip(case.parts(), oracle.divergences(*case)[:3], strict=True):
        assert_within(actual, expected, 1e-12 * (1 + expected))

    weighted = {"alpha": 0.5, "beta": 8.0, "temperature": temperature}
    loss = partial(dkd, teacher_logits=teacher, labels=labels, reduction="none", **weighted)
    expected = oracle.dkd(student, teacher, labels, **weighted)
    assert_within(loss(student), expected, 1e-12 * (1 + expected))
    expected = gradient_of(lambda leaf: oracle.dkd(leaf, teacher, labels, **weighted), student)
    assert_within(gradient_of(loss, student), expected, gradient_tolerance(expected, 8.5 * temperature))


@drawn
@given(cases())
def test_kd_is_tckd_plus_the_rest_of_the_mass_times_nckd(case: Case) -> None:
    tckd, nckd, kd = case.parts()
    _, _, _, b = oracle.divergences(*case)
    largest_odds = torch.maximum(*(case.log_odds(logits).abs() for logits in (case.student, case.teacher)))
    assert_within(tckd + (1 - b) * nckd, kd, 1e-12 * (1 + kd + largest_odds))


@each_dkd_loss
@drawn
@given(cases(), weights, weights)
def test_gradient_is_the_one_derived_by_hand(dkd: Loss, case: Case, alpha: float, beta: float) -> None:
    student, teacher, labels, temperature = case
    weighted = {"alpha": alpha, "beta": beta, "temperature": temperature}
    gradient = gradient_of(partial(dkd, teacher_logits=teacher, labels=labels, reduction="sum", **weighted), student)
    expected = oracle.dkd_gradient(student, teacher, labels, **weighted)
    size = temperature * (alpha + beta)
    assert_within(gradient, expected, gradient_tolerance(expected, size))
    assert_within(gradient.sum(1), 0.0, 2e-15 * size)


@drawn
@given(cases(), st.floats(-100.0, 100.0), st.floats(-100.0, 100.0))
def test_a_constant_added_to_a_row_changes_nothing(case: Case, to_student: float, to_teacher: float) -> None:
    moved = case._replace(student=case.student + to_student, teacher=case.teacher + to_teacher)
    for before, after in zip(case.parts(), moved.parts(), strict=True):
        assert_within(after, before, 1e-12 * (case.scale() + moved.scale()))


@drawn
@given(cases(), st.permutations(range(8)))
def test_the_order_of_the_classes_is_arbitrary(case: Case, order_of_eight: list[int]) -> None:
    order = torch.tensor([column for column in order_of_eight if column < case.student.shape[1]])
    permuted = Case(case.student[:, order], case.teacher[:, order], order.argsort()[case.labels], case.temperature)
    for before, after in zip(case.parts(), permuted.parts(), strict=True):
        assert_within(after, before, 1e-12 * case.scale())


@drawn
@given(cases(), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_nckd_does_not_see_the_target_logits(case: Case, of_student: float, of_teacher: float) -> None:
    target = case.labels[:, None]
    moved = case._replace(
        student=case.student.scatter(1, target, of_student), teacher=case.teacher.scatter(1, target, of_teacher)
    )
    assert torch.equal(moved.parts()[1], case.parts()[1])


@drawn
@given(cases(min_classes=3), st.permutations(range(7)), st.permutations(range(7)))
def test_tckd_does_not_see_the_order_of_the_others(case: Case, of_student: list[int], of_teacher: list[int]) -> None:
    columns = non_target(torch.arange(case.student.shape[1]).expand_as(case.student), case.labels)

    def reordered(logits: Tensor, order: list[int]) -> Tensor:
        others = non_target(logits, case.labels)
        return logits.scatter(1, columns, others[:, [column for column in order if column < others.shape[1]]])

    moved = case._replace(student=reordered(case.student, of_student), teacher=reordered(case.teacher, of_teacher))
    assert_within(moved.parts()[0], case.parts()[0], 1e-12 * case.scale())


@drawn
@given(cases(magnitude=1e3))
def test_equal_rows_are_at_distance_zero(case: Case) -> None:
    for part in case._replace(student=case.teacher).parts():
        assert torch.equal(part, torch.zeros_like(part))


@drawn
@given(cases(magnitude=3.0), st.floats(1e-3, 1.0), st.sampled_from([-1.0, 1.0]))
def test_rows_that_differ_are_at_a_positive_distance(case: Case, change: float, sign: float) -> None:
    target, other = case.labels[:, None], (case.labels[:, None] + 1) % case.student.shape[1]
    change_at = partial(case.teacher.scatter_add, 1, src=torch.full(target.shape, sign * change, dtype=torch.float64))
    tckd, _, kd = case._replace(student=change_at(target)).parts()
    assert (tckd > 0).all()
    assert (kd > 0).all()
    tckd, nckd, kd = case._replace(student=change_at(other)).parts()
    assert (kd > 0).all()
    if case.student.shape[1] == 2:
        assert (tckd > 0).all()
        assert (nckd == 0).all()
    else:
        assert (nckd > 0).all()


@each_dkd_loss
@drawn
@given(cases(magnitude=1e3), weights, weights)
def test_float32_is_float64_up_to_rounding(dkd: Loss, case: Case, alpha: float, beta: float) -> None:
    case = case._replace(student=case.student.float(), teacher=case.teacher.float())
    exact = case._replace(student=case.student.double(), teacher=case.teacher.double())
    bound = 64 * torch.finfo(torch.float32).eps * case.scale()
    for actual, expected in zip(case.parts(), exact.parts(), strict=True):
        assert actual.dtype == torch.float32
        assert_within(actual, expected, bound)
        assert (actual >= -bound).all()

    student, teacher, labels, temperature = case
    weighted = {"alpha": alpha, "beta": beta, "temperature": temperature, "reduction": "none"}
    loss = dkd(student, teacher, labels, **weighted)
    expected = dkd_loss(student.double(), teacher.double(), labels, **weighted)
    bound = temperature**2 * (alpha + beta) * bound
    assert loss.dtype == torch.float32
    assert_within(loss, expected, bound)
    assert (loss >= -bound).all()


# --- The contract: dtypes, rows, reductions, refusals ---


@each_dkd_loss
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_results_are_float32_unless_an_input_is_float64(
    dkd: Loss, student_dtype: torch.dtype, teacher_dtype: torch.dtype, expected: torch.dtype
) -> None:
    student, teacher, labels = normal(rows=4, classes=5)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    results = *decoupled_kl(student, teacher, labels), dkd(student, teacher, labels), kd_loss(student, teacher)
    exact = student.double(), teacher.double()
    references = *decoupled_kl(*exact, labels), dkd_loss(*exact, labels), kd_loss(*exact)
    for result, reference in zip(results, references, strict=True):
        assert result.dtype == expected
        assert_within(result, reference, 64 * torch.finfo(expected).eps * 16)
    assert gradient_of(lambda leaf: dkd(leaf, teacher, labels), student).dtype == student_dtype


@each_dkd_loss
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_are_class_indices(dkd: Loss, dtype: torch.dtype) -> None:
    student, teacher, _ = normal(rows=4, classes=1000)
    # 156 is what -100 wraps to among eight bits.
    labels = torch.tensor([0, 5, 127, 126 if dtype == torch.int8 else 156])
    loss = partial(dkd, student, teacher, reduction="none")
    assert torch.equal(loss(labels.to(dtype)), loss(labels))


@each_dkd_loss
@pytest.mark.parametrize("ignore_index", [-100, -1, 7, 300])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.0])
def test_ignored_rows_are_left_out_whatever_they_hold(dkd: Loss, value: float, ignore_index: int) -> None:
    student, teacher, labels = normal(rows=6, classes=5)
    ignored = torch.tensor([True, False, False, True, False, False])
    kept = student[~ignored], teacher[~ignored], labels[~ignored]
    labels[ignored] = ignore_index
    student[0] = teacher[3] = value
    teacher[0, 1:] = student[3, 2] = -value
    loss = partial(dkd, teacher_logits=teacher, labels=labels, temperature=2.0, ignore_index=ignore_index)
    rows = dkd(*kept, temperature=2.0, reduction="none")
    kept_gradient = gradient_of(lambda leaf: dkd(leaf, *kept[1:], temperature=2.0, reduction="sum"), kept[0])

    assert torch.equal(loss(student, reduction="none"), torch.zeros(6).double().masked_scatter(~ignored, rows))
    assert_within(loss(student, reduction="sum"), rows.sum(), 1e-13)
    assert_within(loss(student), rows.sum() / 4, 1e-13)
    for reduction, divisor in (("none", 1), ("sum", 1), ("mean", 4)):
        gradient = gradient_of(partial(loss, reduction=reduction), student)
        assert torch.equal(gradient[ignored], torch.zeros(2, 5).double())
        assert_within(gradient[~ignored], kept_gradient / divisor, 1e-15)


@each_dkd_loss
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_with_no_labelled_row_is_a_connected_zero(dkd: Loss, rows: int, reduction: str) -> None:
    student, teacher = torch.full((2, rows, 5), math.nan)
    loss = partial(dkd, teacher_logits=teacher, labels=torch.full((rows,), -100), reduction=reduction)
    assert torch.equal(loss(student), torch.zeros(rows) if reduction == "none" else torch.tensor(0.0))
    assert torch.equal(gradient_of(loss, student), torch.zeros(rows, 5))


def test_kd_reductions() -> None:
    student, teacher, _ = normal(rows=6, classes=5)
    rows = kd_loss(student, teacher, temperature=2.0, reduction="none")
    assert rows.shape == (6,)
    assert_within(kd_loss(student, teacher, temperature=2.0, reduction="sum"), rows.sum(), 1e-13)
    assert_within(kd_loss(student, teacher, temperature=2.0), rows.mean(), 1e-13)
    assert kd_loss(student[:0], teacher[:0]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher_logits": torch.zeros(2, 4)}, r"\(2, 3\).*\(2, 4\)"),
        ({"student_logits": torch.zeros(2, 1, 3), "teacher_logits": torch.zeros(2, 1, 3)}, r"\(2, 1, 3\)"),
        ({"student_logits": torch.zeros(2, 1), "teacher_logits": torch.zeros(2, 1)}, r"two classes.*\(2, 1\)"),
        ({"teacher_logits": torch.zeros(2, 3, dtype=torch.int64)}, "torch.int64"),
        ({"labels": torch.tensor([0, 3])}, r"label 3 .*\[0, 3\)"),
        ({"labels": torch.tensor([-1, 0])}, r"label -1 .*\[0, 3\)"),
        ({"labels": torch.tensor([0, -100]), "ignore_index": 0}, "label -100 "),
        ({"labels": torch.tensor([0, 1, 2])}, r"\(3,\).*\(2,\)"),
        ({"labels": torch.tensor([[0, 1]])}, r"\(1, 2\).*\(2,\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, "torch.float32"),
        ({"labels": torch.tensor([True, False])}, "torch.bool"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -2.0}, "temperature is -2.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"alpha": -0.5}, "alpha is -0.5"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"beta": math.nan}, "beta is nan"),
        ({"reduction": "max"}, "'max'"),
    ],
)
def test_what_is_refused_is_named(changed: dict[str, Any], message: str) -> None:
    accepted = {
        "student_logits": torch.zeros(2, 3),
        "teacher_logits": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
    }
    given = accepted | changed
    for dkd in (dkd_loss, chunked):
        with pytest.raises(ValueError, match=message):
            dkd(**given)
    if not changed.keys() & {"alpha", "beta", "reduction", "ignore_index"}:
        with pytest.raises(ValueError, match=message):
            decoupled_kl(**given)
    if "labels" not in changed and not changed.keys() & {"alpha", "beta"}:
        del given["labels"]
        with pytest.raises(ValueError, match=message):
            kd_loss(**given)


def test_no_gradient_flows_to_the_teacher() -> None:
    student, teacher, labels = normal(rows=4, classes=5)
    teacher.requires_grad_()
    losses = *decoupled_kl(student, teacher, labels), dkd_loss(student, teacher, labels), kd_loss(student, teacher)
    assert not any(loss.requires_grad for loss in losses)
    student.requires_grad_()
    (dkd_loss(student, teacher, labels) + kd_loss(student, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_compiled_the_loss_is_the_same() -> None:
    student, teacher, labels = normal(rows=6, classes=5)
    labels[2] = -100
    for loss in (
        partial(dkd_loss, teacher_logits=teacher, labels=labels, alpha=0.5, beta=2.0, temperature=4.0),
        partial(kd_loss, teacher_logits=teacher, temperature=4.0),
    ):
        compiled = torch.compile(loss.func, backend="aot_eager")
        compiled = partial(compiled, **loss.keywords)
        assert_within(compiled(student), loss(student), 1e-14)
        assert_within(gradient_of(compiled, student), gradient_of(loss, student), 1e-14)


def test_autocast_changes_nothing() -> None:
    student, teacher, labels = normal(rows=6, classes=5)
    student, teacher = student.float(), teacher.float()
    for loss in (partial(dkd_loss, teacher_logits=teacher, labels=labels), partial(kd_loss, teacher_logits=teacher)):
        value, gradient = loss(student), gradient_of(loss, student)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(student), value)
            assert torch.equal(gradient_of(loss, student), gradient)
            assert loss(student).dtype == torch.float32
