"""The loss from hidden states: the numbers of the logits that it never makes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from hf_dkd import dkd_loss, fused_linear_dkd_loss
from hf_dkd.losses import fused_linear

IGNORED = -100


class Heads:
    """Hidden states of width 6 and 9 and the weights of 11 classes, or others, in float64."""

    def __init__(self, rows: int = 13, of_student: int = 11, of_teacher: int = 11, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(rows + of_student)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

        self.hidden, self.weight, self.bias = drawn(rows, 6), drawn(of_student, 6), drawn(of_student)
        self.of_teacher, self.teacher_weight, self.teacher_bias = (
            drawn(rows, 9),
            drawn(of_teacher, 9),
            drawn(of_teacher),
        )
        self.labels = torch.randint(min(of_student, of_teacher), (rows,), generator=generator)
        self.labels[::4] = IGNORED

    def leaves(self) -> list[Tensor]:
        for leaf in (self.hidden, self.weight, self.bias):
            leaf.requires_grad_()
        return [self.hidden, self.weight, self.bias]

    def fused(self, **options: Any) -> fused_linear.DKDOutput:
        options = {"student_bias": self.bias, "teacher_bias": self.teacher_bias} | options
        both = self.hidden, self.weight, self.of_teacher, self.teacher_weight
        return fused_linear_dkd_loss(*both, self.labels, **options)

    def logits(
        self, scales: tuple[float, float] = (1, 1), caps: tuple[float | None, float | None] = (None, None)
    ) -> list[Tensor]:
        products = (
            linear(self.hidden.double(), self.weight.double(), self.bias.double()) * scales[0],
            linear(self.of_teacher.double(), self.teacher_weight.double(), self.teacher_bias.double()) * scales[1],
        )
        return [
            logits if cap is None else cap * torch.tanh(logits / cap)
            for logits, cap in zip(products, caps, strict=True)
        ]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.double(), other.double(), rtol=0, atol=tolerance * (1 + other.abs().max().item())
        )


def reference(heads: Heads, ce_weight: float, shapes: dict[str, Any], **weights: float) -> Tensor:
    """The loss that autograd finds from materialised logits, in float64."""
    student, teacher = heads.logits(**shapes)
    shared = min(student.shape[1], teacher.shape[1])
    return dkd_loss(student[:, :shared], teacher[:, :shared], heads.labels, **weights) + ce_weight * cross_entropy(
        student, heads.labels
    )


WEIGHTS = [
    ({"alpha": 1.0, "beta": 2.0}, 0.0),
    ({"alpha": 0.5, "beta": 4.0, "temperature": 4.0}, 0.7),
    ({"alpha": 0.0, "beta": 1.0}, 1.0),
]
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scaled": ({"student_logit_scale": 0.25, "teacher_logit_scale": 3.0}, {"scales": (0.25, 3.0)}),
    "capped": ({"student_softcap": 2.0, "teacher_softcap": 5.0}, {"caps": (2.0, 5.0)}),
    "both": ({"student_logit_scale": 2.0, "student_softcap": 3.0}, {"scales": (2.0, 1.0), "caps": (3.0, None)}),
}


@pytest.mark.parametrize("sizes", [(11, 11), (11, 14), (14, 11)])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("weights", "ce_weight"), WEIGHTS)
@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_loss_and_gradients_are_those_of_the_logits(
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int],
    name: str,
    weights: dict[str, float],
    ce_weight: float,
    block: int,
) -> None:
    monkeypatch.setitem(fused_linear._BLOCK_LOGITS, "cpu", block)
    heads, (options, shapes) = Heads(13, *sizes), OPTIONS[name]
    leaves = heads.leaves()
    found = heads.fused(ce_weight=ce_weight, **weights, **options)
    expected = reference(heads, ce_weight, shapes, **weights)
    assert_same([found.loss], [expected])
    assert_same(list(torch.autograd.grad(3 * found.loss, leaves)), list(torch.autograd.grad(3 * expected, leaves)))
    if ce_weight:
        kept = heads.labels != IGNORED
        assert_same([found.ce], [cross_entropy(heads.logits(**shapes)[0][kept], heads.labels[kept])])


def test_the_parts_are_means_over_the_labelled_rows_and_sums_on_demand() -> None:
    heads = Heads()
    student, teacher = heads.logits()
    kept = heads.labels != IGNORED
    found, summed = heads.fused(), heads.fused(reduction="sum")
    agreement = (student.argmax(1) == teacher.argmax(1))[kept].double()
    assert_same([found.agreement, summed.agreement], [agreement.mean(), agreement.sum()])
    assert_same(
        [summed.loss, summed.tckd, summed.nckd], [part * kept.sum() for part in (found.loss, found.tckd, found.nckd)]
    )
    assert_same([found.loss], [found.tckd + found.nckd])


def test_ignored_rows_enter_no_product() -> None:
    heads = Heads()
    ignored = heads.labels == IGNORED
    expected = heads.fused().loss
    heads.hidden[ignored], heads.of_teacher[ignored] = math.nan, math.inf
    leaves = heads.leaves()
    found = heads.fused().loss
    assert found == expected
    of_hidden, *of_head = torch.autograd.grad(found, leaves)
    assert (of_hidden[ignored] == 0).all()
    assert all(gradient.isfinite().all() for gradient in of_head)


@pytest.mark.parametrize("rows", [0, 5])
def test_without_a_labelled_row_the_loss_is_a_connected_zero(rows: int) -> None:
    heads = Heads(rows)
    heads.labels[:] = IGNORED
    leaves = heads.leaves()
    loss = heads.fused(ce_weight=1.0).loss
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    heads = Heads()
    leaves = heads.leaves()
    every = torch.autograd.grad(heads.fused().loss, leaves)
    leaves[frozen].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    some = torch.autograd.grad(heads.fused().loss, wanted)
    assert_same(list(some), [gradient for index, gradient in enumerate(every) if index != frozen], 1e-15)
    for leaf in wanted:
        leaf.requires_grad_(False)
    assert not heads.fused().loss.requires_grad


def test_tied_embeddings_get_both_gradients() -> None:
    heads = Heads()
    embeddings = heads.weight.detach().clone().requires_grad_()
    tokens = torch.randint(len(embeddings), (len(heads.labels),), generator=torch.Generator().manual_seed(0))

    def gradient(fused: bool) -> Tensor:
        heads.hidden, heads.weight = torch.tanh(embeddings[tokens]), embeddings
        loss = heads.fused(beta=2.0).loss if fused else reference(heads, 0.0, {}, beta=2.0)
        return torch.autograd.grad(loss, embeddings)[0]

    assert_same([gradient(True)], [gradient(False)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # 400 blocks of one row: a half-precision sum would stop growing long before.
    monkeypatch.setitem(fused_linear._BLOCK_LOGITS, "cpu", 1)
    heads = Heads(400, dtype=dtype)
    leaves = heads.leaves()
    found = heads.fused(reduction="sum", ce_weight=1.0)
    expected = reference(heads, 1.0, {}) * (heads.labels != IGNORED).sum()
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-2)
    gradients = torch.autograd.grad(found.loss, leaves)
    for gradient, leaf, right in zip(gradients, leaves, torch.autograd.grad(expected, leaves), strict=True):
        assert gradient.dtype == leaf.dtype
        error = (gradient.double() - right.double()).abs().max() / right.double().abs().max()
        assert error < 4 * torch.finfo(dtype).eps * (4 if dtype == torch.float16 else 1)


def test_under_autocast_products_are_in_its_type_and_gradients_in_that_of_the_weights() -> None:
    heads = Heads(dtype=torch.float32)
    leaves = heads.leaves()
    exact = heads.fused(ce_weight=1.0).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads.fused(ce_weight=1.0).loss
    assert found.dtype == torch.float32
    assert found != exact
    assert found.item() == pytest.approx(exact.item(), rel=2e-2)
    assert [gradient.dtype for gradient in torch.autograd.grad(found, leaves)] == [torch.float32] * 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_none_is_made(monkeypatch: pytest.MonkeyPatch, mode: type) -> None:
    heads = Heads()
    heads.hidden[1] *= 100  # such a row is computed by the definition
    wanted = heads.fused(ce_weight=0.5)
    heads.leaves()
    monkeypatch.setattr(fused_linear, "_add_product", lambda *_: pytest.fail("a gradient of the weight"))
    with mode():
        found = heads.fused(ce_weight=0.5)
    assert not found.loss.requires_grad
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_no_gradient_flows_to_the_teacher_and_a_second_backward_is_refused() -> None:
    heads = Heads()
    heads.leaves()
    heads.teacher_weight.requires_grad_()
    loss = heads.fused().loss
    loss.backward(retain_graph=True)
    assert heads.teacher_weight.grad is None
    with pytest.raises(RuntimeError, match="second backward through one DKD loss"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(heads.fused().loss, heads.hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(13, 2, 6)}, r"student has hidden states \(13, 2, 6\), weight \(11, 6\).*flatten"),
        ({"teacher_weight": torch.zeros(11, 8)}, r"teacher has hidden states \(13, 9\), weight \(11, 8\)"),
        ({"bias": torch.zeros(4)}, r"student's bias has shape \(4,\)"),
        ({"of_teacher": torch.zeros(12, 9)}, "13 rows of hidden states and the teacher 12"),
        ({"labels": torch.full((13,), 11)}, r"label 11 is outside \[0, 11\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    heads = Heads()
    for name, value in change.items():
        setattr(heads, name, value.double() if value.is_floating_point() else value)
    with pytest.raises(ValueError, match=message):
        heads.fused()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, 'reduction is \'none\'; expected "mean" or "sum"'),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"student_softcap": 0.0}, "student's softcap is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Heads().fused(**options)


def test_a_teacher_that_emits_nan_is_refused() -> None:
    heads = Heads()
    heads.of_teacher[1] = math.nan
    with pytest.raises(ValueError, match="teacher's row 1 cannot be distilled"):
        heads.fused()
