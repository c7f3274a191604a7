"""Distillation losses on rows of logits. Imports torch and NumPy only."""

from .chunked import DKDOutput, chunked_dkd_loss
from .decoupled import decoupled_kl, dkd_loss, kd_loss
from .fused_linear import fused_linear_dkd_loss
from .grouped import GroupedKL, grouped_dkd_loss, grouped_kl, mixed_groups, top_k_groups
from .standardized import standardized
from .truncated import TopOutputs, top_outputs, truncated_kl

__all__ = [
    "DKDOutput",
    "GroupedKL",
    "TopOutputs",
    "chunked_dkd_loss",
    "decoupled_kl",
    "dkd_loss",
    "fused_linear_dkd_loss",
    "grouped_dkd_loss",
    "grouped_kl",
    "kd_loss",
    "mixed_groups",
    "standardized",
    "top_k_groups",
    "top_outputs",
    "truncated_kl",
]
