"""Z-scores of rows of logits: their definition, what they do not see, masks, and rows without a spread."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dkd.losses import dkd_loss, standardized
from tests.oracle import assert_within, gradient_of

logits = 3 * torch.randn(16, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_it_is_the_authors_z_score() -> None:
    expected = (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))
    assert_within(standardized(logits), expected, 1e-14)
    by_hand = gradient_of(lambda leaf: ((leaf - leaf.mean(1, keepdim=True)) / leaf.std(1, keepdim=True))[:, 0], logits)
    assert_within(gradient_of(lambda leaf: standardized(leaf)[:, 0], logits), by_hand, 1e-6)


@settings(deadline=None, derandomize=True)
@given(st.floats(0.1, 100.0), st.floats(-100.0, 100.0))
def test_scale_and_shift_of_a_model_are_not_seen(scale: float, shift: float) -> None:
    assert_within(standardized(scale * logits + shift), standardized(logits), 1e-5)
    labels = torch.arange(16) % 7
    loss = dkd_loss(standardized(scale * logits + shift), standardized(logits), labels)
    assert_within(loss, 0.0, 1e-9)


def test_masked_classes_stay_masked_and_count_for_nothing() -> None:
    masked = torch.cat((logits, torch.full((16, 2), -math.inf, dtype=torch.float64)), dim=1)
    assert_within(standardized(masked)[:, :7], standardized(logits), 1e-14)
    assert (standardized(masked)[:, 7:] == -math.inf).all()
    gradient = gradient_of(lambda leaf: standardized(leaf)[:, :7].square().sum(1) + standardized(leaf)[:, 0], masked)
    assert gradient.isfinite().all()
    assert not gradient[:, 7:].any()


def test_equal_logits_are_zeros_with_a_finite_gradient() -> None:
    equal = torch.full((2, 5), 3.0)
    assert not standardized(equal).any()
    assert gradient_of(lambda leaf: standardized(leaf)[:, 0], equal).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = logits.to(dtype)
    assert standardized(half).dtype == torch.float32
    assert torch.equal(standardized(half), standardized(half.float()))


def test_two_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least three classes; got 2"):
        standardized(torch.zeros(4, 2))


def test_rows_of_two_visible_classes_have_no_z_scores() -> None:
    rows = torch.tensor([[1.0, 5.0, -math.inf, -math.inf], [1.0, 2.0, 4.0, -math.inf]])
    assert standardized(rows)[0].tolist() == [0, 0, -math.inf, -math.inf]
    assert standardized(rows)[1, :3].std().item() == pytest.approx(1, abs=1e-5)
