"""The usual metrics of a causal language model, without gathering the logits of every token."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import EvalPrediction

TOKEN_SCORES = ("negative_log_likelihood", "tokens", "hits")


def token_scores(logits: Any, labels: Tensor) -> Tensor:
    """For `preprocess_logits_for_metrics`: logits (B, L, V) and labels (B, L) → TOKEN_SCORES of each example (B, 3).

    They are the sum of the negative log-likelihoods, in nats, over the labelled tokens; their number; and how many of
    them the model ranks first. The logits at a token are those of the next one, as in every causal model.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = pad(labels[:, 1:], (0, 1), value=-100)
    losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    scores = (losses.view_as(labels), labels != -100, logits.argmax(-1) == labels)
    return torch.stack([values.sum(1) for values in scores], dim=1)


def language_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `compute_metrics`, beside `token_scores`: perplexity per token, and accuracy of the most likely token."""
    scores: Any = prediction.predictions
    loss, tokens, hits = scores.sum(axis=0, dtype=np.float64)
    return {"perplexity": float(np.exp(loss / tokens)), "token_accuracy": float(hits / tokens)}
