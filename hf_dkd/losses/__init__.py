"""Distillation losses on rows of logits. Imports torch only."""

from .decoupled import decoupled_kl, dkd_loss, kd_loss
from .grouped import GroupedKL, grouped_dkd_loss, grouped_kl, mixed_groups, top_k_groups
from .standardized import standardized
from .truncated import TopOutputs, top_outputs, truncated_kl

__all__ = [
    "GroupedKL",
    "TopOutputs",
    "decoupled_kl",
    "dkd_loss",
    "grouped_dkd_loss",
    "grouped_kl",
    "kd_loss",
    "mixed_groups",
    "standardized",
    "top_k_groups",
    "top_outputs",
    "truncated_kl",
]
