"""Distillation losses on rows of logits. Imports torch only."""

from .decoupled import decoupled_kl, dkd_loss, kd_loss

__all__ = ["decoupled_kl", "dkd_loss", "kd_loss"]
