"""Logits standardised row by row, so that teacher and student agree in shape and not in scale.

Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024 (arXiv 2403.01427, algorithm 1).
"""

import math

import torch
from torch import Tensor

_EPSILON = 1e-7


def standardized(logits: Tensor) -> Tensor:
    """The z-scores of each row of logits, (N, C) → (N, C): (logits − mean) / standard deviation.

    The deviation is the unbiased one, as in the authors' code; a row of equal logits becomes zeros. Classes masked by
    -inf stay masked, and count for neither; where they leave fewer than three, the others become zeros. Half precision
    is computed and returned in float32.

    Raises:
        ValueError: for fewer than three classes: two standardised logits are always ±0.71, whatever the model says.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"Standardising logits needs at least three classes; got {logits.shape[1]}. The z-scores of two logits "
            "tell only which is the larger: set dkd_standardize to False."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    masked = logits == -math.inf
    count = (~masked).sum(1, keepdim=True)
    below = logits - logits.masked_fill(masked, 0.0).sum(1, keepdim=True) / count
    below = below.masked_fill(masked | (count < 3), 0.0)
    variance = below.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    # The slope of a square root is infinite at 0, where it would meet a factor of 0.
    deviation = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return (below / (deviation + _EPSILON)).masked_fill(masked, -math.inf)
