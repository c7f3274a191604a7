"""The GPU row pass against the definition in float64: on a GPU where there is one, else in Triton's interpreter."""

import math
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_dkd.losses import decoupled_kl, dkd_loss, kd_loss
from tests import oracle
from tests.oracle import assert_within, gradient_of

pytest.importorskip("triton", reason="the GPU kernels need Triton, which is not installed")

from hf_dkd.losses import triton_kernels  # imports Triton
from hf_dkd.losses.row_pass import RowTerms, Weights
from hf_dkd.losses.triton_kernels import scale_gradient_

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

INF = math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONG = triton_kernels.ONE_BLOCK + 907  # several blocks, the last one ragged
WEIGHTS: list[dict[str, Any]] = [
    {"alpha": 1.0, "beta": 8.0},
    {"alpha": 0.5, "beta": 2.0, "ce_weight": 0.7},
    {"alpha": 0.0, "beta": 2.0, "ce_weight": 1.0},
    {"alpha": 2.0, "beta": 0.0},
    {"alpha": 0.5, "beta": 0.0, "ce_weight": 0.3, "classical": True},
]
every_length = pytest.mark.parametrize("classes", [7, LONG])


def row_pass(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    ce_weight: float = 0.0,
    classical: bool = False,
    **options: Any,
) -> RowTerms:
    weights = Weights(alpha, beta, temperature, ce_weight or None, classical)
    return triton_kernels.row_pass(student, teacher, labels, weights, **options)


def drawn(rows: int, classes: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels, the last class first."""
    generator = torch.Generator().manual_seed(rows + classes)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    return student.to(DEVICE), teacher.to(DEVICE), labels.index_fill(0, torch.tensor(0), classes - 1).to(DEVICE)


def run(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> tuple[RowTerms, Tensor]:
    """What the kernels find, on the CPU."""
    gradient = settings.pop("gradient", torch.full_like(student, math.nan))
    settings = {"alpha": 1.0, "beta": 1.0, "temperature": 1.0} | settings
    terms = row_pass(student, teacher, labels, gradient=gradient, **settings)
    assert [term.dtype for term in terms] == 5 * [torch.float32] + [torch.bool, torch.uint8]
    return RowTerms(*(term.cpu() for term in terms)), gradient.cpu()


def check(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> tuple[RowTerms, Tensor]:
    """Compare every term and the gradient with the definition; rows without fault and without ignored labels."""
    terms, gradient = run(student, teacher, labels, **settings)
    dtype, (student, teacher, labels) = student.dtype, (student.cpu().double(), teacher.cpu().double(), labels.cpu())
    settings.pop("gradient", None)
    settings = {"alpha": 1.0, "beta": 1.0, "temperature": 1.0, "ce_weight": 0.0, "classical": False} | settings
    alpha, beta, T, ce_weight, classical = settings.values()

    def weighted(leaf: Tensor) -> Tensor:
        if classical:
            return alpha * kd_loss(leaf, teacher, temperature=T, reduction="none")
        return dkd_loss(leaf, teacher, labels, alpha=alpha, beta=beta, temperature=T, reduction="none")

    def objective(leaf: Tensor) -> Tensor:
        ce = ce_weight * cross_entropy(leaf, labels, reduction="none") if ce_weight else 0.0
        return weighted(leaf) + ce

    finite = torch.cat((student, teacher), 1).nan_to_num(neginf=0.0).abs().amax(1)
    tolerance = 64 * torch.finfo(torch.float32).eps * (1 + finite / T)
    tckd, nckd = decoupled_kl(student, teacher, labels, temperature=T)
    assert_within(terms.tckd, tckd, tolerance)
    assert_within(terms.nckd, nckd, tolerance)
    size = alpha + (alpha if classical else beta)
    assert_within(terms.dkd, weighted(student), T**2 * size * tolerance)
    ce = cross_entropy(student, labels, reduction="none") if ce_weight else torch.zeros(len(labels))
    assert_within(terms.ce, ce, tolerance)
    assert torch.equal(terms.agrees, student.argmax(1) == teacher.argmax(1))
    assert torch.equal(terms.fault, torch.zeros(len(labels), dtype=torch.uint8))

    expected = gradient_of(objective, student)
    largest = expected.abs().amax(1, keepdim=True).clamp(min=1e-3 * (T * size + ce_weight))
    rounding = torch.finfo(dtype).eps * (expected.abs() + torch.finfo(dtype).smallest_normal)
    assert_within(gradient, expected, tolerance[:, None] * largest + rounding)
    return terms, gradient


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 100, 1000, LONG])
def test_values_and_gradients_are_the_definitions(classes: int, temperature: float, weights: dict[str, Any]) -> None:
    rows = drawn(2, classes)
    terms, gradient = check(*rows, temperature=temperature, **weights)
    if classes == 2:
        assert torch.equal(terms.nckd, torch.zeros(2))
    if not weights.get("classical") and not weights.get("ce_weight"):
        exact = [tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu() for tensor in rows]
        expected = oracle.dkd_gradient(*exact, temperature=temperature, **weights)
        assert_within(gradient, expected, 1e-4 * expected.abs().amax(1, keepdim=True).clamp(min=1e-2 * temperature))


@pytest.mark.parametrize("classes", [100, LONG])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_every_dtype(student: torch.dtype, teacher: torch.dtype, classes: int) -> None:
    s, t, labels = drawn(2, classes)
    check(s.to(student), t.to(teacher), labels, temperature=2.0, ce_weight=1.0)


def test_the_longest_rows() -> None:
    s, t, labels = drawn(1, 66_001)
    check(s.bfloat16(), t.bfloat16(), labels)


@every_length
def test_rows_apart_gradient_in_place_and_ignored_rows(classes: int) -> None:
    student, teacher, labels = drawn(3, classes)
    labels[1] = -100
    student[1], teacher[1] = math.nan, INF
    expected_terms, expected = run(student, teacher, labels, ce_weight=1.0)
    assert torch.equal(expected[1], torch.zeros(classes))
    assert [term[1].item() for term in expected_terms] == [0, 0, 0, 0, 0, False, 0]
    assert expected[[0, 2]].isfinite().all()
    check(student[::2], teacher[::2], labels[::2], ce_weight=1.0)  # every other row

    apart, student = student.new_full((3, classes + 5), 7.0), student.clone()
    apart[:, :classes] = student
    for gradient in (student, apart[:, :classes]):
        terms, actual = run(gradient, teacher, labels, ce_weight=1.0, gradient=gradient)
        assert all(torch.equal(term, expected_term) for term, expected_term in zip(terms, expected_terms, strict=True))
        assert torch.equal(actual, expected)
    assert (apart[:, classes:] == 7.0).all()

    without = row_pass(apart[:, :classes], teacher, labels, alpha=1.0, beta=1.0, temperature=1.0, ignore_index=-100)
    assert without.dkd[0].isfinite()
    others = run(student, teacher, labels.clamp(min=0), ignore_index=int(labels[0]))[1]
    assert torch.equal(others[0], torch.zeros(classes))


def test_rows_beyond_32_bits() -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # the pages between the rows stay untouched
    far = memory.as_strided((2, 5), (2**31 + 32, 1))
    student, teacher, labels = drawn(2, 5)
    far.copy_(student)
    check(far, teacher, labels, gradient=far.clone())
    run(far, teacher, labels, gradient=far)
    assert torch.equal(far.cpu(), run(student.bfloat16(), teacher, labels)[1])


@every_length
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_masked_classes_contribute_nothing(temperature: float, classes: int) -> None:
    student, teacher, labels = drawn(3, classes)
    labels[:] = 1
    teacher[:, ::2] = -INF
    teacher[0, : classes // 2] = -INF  # whole lanes and blocks
    teacher[1, 1] = -INF  # the target
    student[:, ::4] = -INF
    student[0, : classes // 2 - 1] = -INF
    student[0, 1] = 0.5
    _, gradient = check(student, teacher, labels, temperature=temperature, beta=3.0, ce_weight=1.0)
    assert (gradient[student.cpu() == -INF] == 0).all()


@every_length
def test_faults(classes: int) -> None:
    student, teacher, labels = drawn(12, classes)
    labels[:], last = 3, classes - 1
    for row, column, value in [(1, last, math.nan), (2, 0, INF), (3, 3, INF), (4, 3, math.nan)]:
        teacher[row, column] = value
    teacher[5, :3], teacher[5, 4:] = -INF, -INF
    student[6, last], student[7, 3], student[8, 0] = -INF, -INF, -INF
    teacher[8, 0] = -1e4  # mass that underflows is mass
    student[9], teacher[10, 0], teacher[11, 3] = -INF, -INF, -INF
    terms = row_pass(student, teacher, labels, alpha=1.0, beta=1.0, temperature=0.5)
    assert terms.fault.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert terms.dkd[[0, 10, 11]].isfinite().all()


@every_length
@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_broken_student_and_a_label_outside_are_no_loss_of_zero(value: float, classes: int) -> None:
    student, teacher, labels = drawn(5, classes)
    student[0, labels[0]], student[1, (labels[1] + 1) % classes] = value, value
    labels[2], labels[3] = classes, -1
    terms, _ = run(student, teacher, labels, ce_weight=1.0)
    for values in (terms.ce, terms.tckd, terms.dkd):
        assert values.isfinite().tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("classes", [40, LONG])
def test_the_first_of_equal_logits_is_the_argmax(classes: int) -> None:
    near, last = 9, classes - 1
    for label, first, second in [(0, near, near + 1), (0, near, last), (near, near, last), (last, near, last)]:
        student, teacher = torch.zeros(2, 2, classes, device=DEVICE)
        student[:, [first, second]], teacher[0, first], teacher[1, second] = 5.0, 5.0, 5.0
        terms, _ = run(student, teacher, torch.tensor([label, label], device=DEVICE))
        assert terms.agrees.tolist() == [True, False]


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@every_length
def test_wide_gaps_and_common_offsets(classes: int, temperature: float) -> None:
    student, teacher, labels = drawn(7, classes)
    labels[:] = 2
    student[0, 2], student[1, 2], student[2, -1] = 1e4, -1e4, 1e4
    teacher[2, 2], teacher[3, 2], teacher[4, 4] = 1e4, -1e4, 1e4
    student[5] += 1e4
    teacher[5] -= 1e4
    student[6, ::2], teacher[6, ::2] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    check(student[:6], teacher[:6], labels[:6], temperature=temperature, beta=2.0, ce_weight=1.0)
    terms, gradient = run(student[6:], teacher[6:], labels[6:], temperature=temperature)
    assert torch.isfinite(torch.stack(terms[:4])).all()
    assert gradient.isfinite().all()


def test_a_weight_of_zero_removes_an_infinite_term() -> None:
    student, teacher, labels = drawn(2, 7)
    labels[:] = 2
    # Infinite in float32 when divided by T.
    student[0, 2], teacher[0, 2], student[1, 5], teacher[1, 5] = -3e38, 3e38, -3e38, 10.0
    weighted = partial(run, student, teacher, labels, temperature=0.5)
    terms, _ = weighted()
    assert terms.tckd[0] == terms.nckd[1] == INF
    for row, alpha, beta in [(0, 0.0, 3.0), (1, 3.0, 0.0)]:
        terms, gradient = weighted(alpha=alpha, beta=beta)
        kept = terms.nckd if row == 0 else terms.tckd
        assert terms.dkd[row] == 0.25 * 3.0 * kept[row]
        assert gradient[row].isfinite().all()
    terms, gradient = weighted(alpha=0.0, beta=0.0)
    assert torch.equal(terms.dkd, torch.zeros(2))
    assert torch.equal(gradient, torch.zeros(2, 7))


def test_scales() -> None:
    student, teacher, labels = drawn(3, 100)
    _, once = run(student, teacher, labels, ce_weight=1.0)
    for scale in (0.25, torch.tensor(0.25, device=DEVICE), torch.tensor(0.25, device=DEVICE, dtype=torch.float64)):
        assert torch.equal(run(student, teacher, labels, ce_weight=1.0, scale=scale)[1], 0.25 * once)


@pytest.mark.parametrize(("rows", "classes"), [(0, 100), (2, 100), (2, LONG)])
def test_scale_gradient(rows: int, classes: int) -> None:
    apart = torch.randn(rows, classes + 3, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    for factor in (1.0, 0.3, math.nan):
        before = apart.clone()
        scale_gradient_(apart[:, :classes], torch.tensor(factor, device=DEVICE))
        expected = before[:, :classes].float() * factor
        one_ulp = 0.0 if factor == 1.0 else torch.finfo(torch.bfloat16).eps  # the interpreter truncates
        torch.testing.assert_close(apart[:, :classes].float(), expected, rtol=one_ulp, atol=0.0, equal_nan=True)
        assert torch.equal(apart[:, classes:], before[:, classes:])


def test_no_rows() -> None:
    empty = torch.zeros(0, 5, device=DEVICE)
    terms, gradient = run(empty, empty, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert [term.shape for term in terms] == 7 * [(0,)]
    assert gradient.shape == (0, 5)


@pytest.mark.slow
def test_the_kernels_compile_without_a_gpu() -> None:
    """What the interpreter lets pass (types, tuples, layouts) the compiler sees; it needs no device for that."""
    command = [sys.executable, "-m", "tests.losses.compile_triton_kernels"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["128 bits at a time: True"] * 2
