"""Decoupled Knowledge Distillation (Zhao et al., CVPR 2022) for Hugging Face Transformers."""

from .losses import decoupled_kl, dkd_loss, kd_loss

__version__ = "0.1.0"

__all__ = ["decoupled_kl", "dkd_loss", "kd_loss"]
