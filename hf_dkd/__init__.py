"""Decoupled Knowledge Distillation (Zhao et al., CVPR 2022) for Hugging Face Transformers."""

from .cache import cache_teacher_outputs
from .cached_teacher import CachedTeacher
from .data import DataCollatorForMixup, DataCollatorWithTeacherInputs
from .losses import decoupled_kl, dkd_loss, fused_linear_dkd_loss, kd_loss
from .teacher import Teacher
from .trainer import DKDMixin, DKDSeq2SeqTrainer, DKDTrainer
from .training_args import DKDArgumentsMixin, DKDSeq2SeqTrainingArguments, DKDTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher",
    "DKDArgumentsMixin",
    "DKDMixin",
    "DKDSeq2SeqTrainer",
    "DKDSeq2SeqTrainingArguments",
    "DKDTrainer",
    "DKDTrainingArguments",
    "DataCollatorForMixup",
    "DataCollatorWithTeacherInputs",
    "Teacher",
    "cache_teacher_outputs",
    "decoupled_kl",
    "dkd_loss",
    "fused_linear_dkd_loss",
    "kd_loss",
]
