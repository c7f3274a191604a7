"""The settings of a distillation, as fields of training arguments."""

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .heads import Head

_NUMBERS = (
    "dkd_alpha",
    "dkd_beta",
    "dkd_top_k_beta",
    "ce_weight",
    "dkd_warmup_steps",
    "dkd_warmup_epochs",
    "dkd_temperature",
)
_HEADS = tuple(str(head) for head in Head)


@dataclass
class DKDArgumentsMixin:
    """Fields for decoupled knowledge distillation, to be put before any `TrainingArguments` class.

    The objective is ce_weight·CE + w·T²·(α·TCKD + β·NCKD) (Zhao et al., CVPR 2022, arXiv 2203.08679). CE is the
    hard-label loss that the script would train on without a teacher. The fields are read when used, so that a
    hyper-parameter search may change them, and are checked when built and again when training starts.

    Raises:
        ValueError: for values out of range, and for settings that exclude each other.
    """

    dkd_alpha: float = field(default=1.0, metadata={"help": "Weight of TCKD, 0 or above. With 'kd', the weight of KL."})
    dkd_beta: float = field(
        default=1.0,
        metadata={"help": "Weight of NCKD, 0 or above: 1 to 2 for ViTs and confident teachers, 2 to 8 for convnets."},
    )
    dkd_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both softmaxes, above 0. The paper takes 4 on CIFAR-100."}
    )
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the hard-label loss, 0 or above."})
    dkd_warmup_steps: float = field(
        default=0.0,
        metadata={
            "help": "Optimizer steps over which the distillation weight grows to 1; below 1: a share of them all."
        },
    )
    dkd_warmup_epochs: float = field(
        default=0.0, metadata={"help": "The same in epochs (the paper: 20 of 240). Give steps or epochs, not both."}
    )
    dkd_warmup_staircase: bool = field(
        default=False,
        metadata={
            "help": "Hold the weight within an epoch, as the paper's code does: the epoch, from 1, over "
            "dkd_warmup_epochs."
        },
    )
    distillation: str = field(
        default="dkd", metadata={"help": "'dkd', or 'kd' for classical distillation.", "choices": ["dkd", "kd"]}
    )
    dkd_target: str = field(
        default="label",
        metadata={
            "help": "'label': rows without a label are not distilled. 'teacher': there the teacher's most likely class "
            "is the target, so that data may have few labels or none.",
            "choices": ["label", "teacher"],
        },
    )
    dkd_standardize: bool = field(
        default=False,
        metadata={"help": "Take the z-scores of each row of both logits before the temperature (Sun et al. 2024)."},
    )
    dkd_top_k: int = field(
        default=0,
        metadata={
            "help": "Divide the classes by the teacher's ranking instead of the label: its first, its second to k-th, "
            "and the rest (Zheng and Cheng 2025, there 5 for ViTs); 0 divides by the label."
        },
    )
    dkd_top_k_beta: float = field(
        default=1.0, metadata={"help": "With dkd_top_k, the weight of the divergence among the second to k-th class."}
    )
    dkd_head: str | None = field(
        default=None,
        metadata={
            "help": f"Kind of head, where the architecture does not tell: {', '.join(_HEADS)}.",
            "choices": _HEADS,
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Path or Hub id of the teacher, loaded by the Auto class of the student."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keywords of from_pretrained for the teacher, as JSON: dtype, attn_implementation, …"},
    )
    teacher_compile: bool = field(
        default=False, metadata={"help": "Run the teacher under torch.compile: minutes at first, then faster on a GPU."}
    )
    use_fused_linear: str = field(
        default="auto",
        metadata={
            "help": "Make a language model's loss from hidden states, block by block, so that no logits are stored: "
            "'auto' where that can be done, 'always' or an error, 'never'.",
            "choices": ["auto", "always", "never"],
        },
    )
    eval_with_teacher: bool = field(
        default=False, metadata={"help": "Run the teacher in evaluation too and report TCKD, NCKD and agreement."}
    )

    def __post_init__(self) -> None:
        if self.teacher_model_name_or_path is not None:
            self.teacher_model_name_or_path = os.fspath(self.teacher_model_name_or_path)
        if isinstance(self.teacher_model_init_kwargs, str):
            try:
                self.teacher_model_init_kwargs = json.loads(self.teacher_model_init_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"teacher_model_init_kwargs is {self.teacher_model_init_kwargs!r}; expected a JSON object: {error}."
                ) from None
        if not isinstance(self.teacher_model_init_kwargs, dict | None):
            raise ValueError(
                f"teacher_model_init_kwargs is {self.teacher_model_init_kwargs!r}; expected a JSON object."
            )
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
        self.check_distillation()

    def check_distillation(self) -> None:
        """Raise a `ValueError` that names the first setting out of range."""
        for name in _NUMBERS:
            # A hyper-parameter search casts to the type of the old value: an int would truncate what it tries.
            try:
                value = float(getattr(self, name))
            except (TypeError, ValueError):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number.") from None
            setattr(self, name, value)
            if not math.isfinite(value) or value < 0 or (name == "dkd_temperature" and value == 0):
                raise ValueError(f"{name} is {value}; expected a finite number {_expected_range(name)}.")
        if self.dkd_warmup_steps and self.dkd_warmup_epochs:
            raise ValueError(
                f"dkd_warmup_steps is {self.dkd_warmup_steps} and dkd_warmup_epochs is {self.dkd_warmup_epochs}; set "
                "one of them and leave the other 0."
            )
        if self.dkd_warmup_staircase and self.dkd_warmup_steps:
            raise ValueError(
                f"dkd_warmup_staircase holds the weight within an epoch, but dkd_warmup_steps is "
                f"{self.dkd_warmup_steps}: give the length of the warm-up as dkd_warmup_epochs."
            )
        if self.dkd_warmup_steps >= 1 and not self.dkd_warmup_steps.is_integer():
            raise ValueError(
                f"dkd_warmup_steps is {self.dkd_warmup_steps}; expected a whole number, or below 1 a share of steps."
            )
        if self.distillation not in ("dkd", "kd"):
            raise ValueError(f'distillation is {self.distillation!r}; expected "dkd" or "kd".')
        if self.dkd_target not in ("label", "teacher"):
            raise ValueError(f'dkd_target is {self.dkd_target!r}; expected "label" or "teacher".')
        if self.use_fused_linear not in ("auto", "always", "never"):
            raise ValueError(f'use_fused_linear is {self.use_fused_linear!r}; expected "auto", "always" or "never".')
        if self.distillation == "kd" and self.dkd_beta != 1:
            raise ValueError(
                f'dkd_beta is {self.dkd_beta} with distillation="kd", which has no NCKD term of its own: set '
                "dkd_alpha, the weight of its KL, and leave dkd_beta alone."
            )
        self._check_groups()
        if self.dkd_head is not None and self.dkd_head not in _HEADS:
            raise ValueError(f"dkd_head is {self.dkd_head!r}; expected one of {', '.join(_HEADS)}.")
        if self.ce_weight == 0 and not self.distils:
            raise ValueError("ce_weight and the distillation weights are all 0: nothing would be trained.")

    def _check_groups(self) -> None:
        if isinstance(self.dkd_top_k, bool) or not isinstance(self.dkd_top_k, int) or self.dkd_top_k < 0:
            raise ValueError(f"dkd_top_k is {self.dkd_top_k!r}; expected a whole number, 0 or the k of the top k.")
        if self.dkd_top_k and self.distillation == "kd":
            raise ValueError(
                f'dkd_top_k is {self.dkd_top_k} with distillation="kd", which does not divide the classes: choose one.'
            )
        if self.dkd_top_k < 3 and self.dkd_top_k_beta != 1:
            raise ValueError(
                f"dkd_top_k_beta is {self.dkd_top_k_beta} with dkd_top_k {self.dkd_top_k}: it weighs the teacher's "
                "second to k-th class, which need to be two or more. Set dkd_top_k to 3 or more."
            )

    @property
    def distils(self) -> bool:
        """Whether any distillation term has weight, so that the teacher must run."""
        of_dkd = self.dkd_beta > 0 or (self.dkd_top_k > 2 and self.dkd_top_k_beta > 0)
        return self.dkd_alpha > 0 or (self.distillation == "dkd" and of_dkd)

    def dkd_weight(self, step: int, max_steps: int, steps_per_epoch: int | None) -> float:
        """The warm-up weight w = min(1, step / W) of optimizer step `step` = 1, 2, …; 1 without warm-up.

        With `dkd_warmup_staircase` all steps of an epoch have the weight of its last one.
        """
        if self.dkd_warmup_epochs:
            if steps_per_epoch is None:
                raise ValueError("dkd_warmup_epochs needs a data set with a length; set dkd_warmup_steps instead.")
            warmup = self.dkd_warmup_epochs * steps_per_epoch
            if self.dkd_warmup_staircase:
                step = math.ceil(step / steps_per_epoch) * steps_per_epoch
        elif self.dkd_warmup_steps < 1:
            warmup = math.ceil(self.dkd_warmup_steps * max_steps)
        else:
            warmup = self.dkd_warmup_steps
        return min(1.0, step / warmup) if warmup else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`: the teacher's keywords with quantization spelled out, and no token."""
        given = self.teacher_model_init_kwargs
        if isinstance(given, dict):
            # A copy: the parent turns dtypes into strings in place.
            shown = dict(given)
            if hasattr(shown.get("quantization_config"), "to_dict"):
                shown["quantization_config"] = shown["quantization_config"].to_dict()
            if isinstance(shown.get("token"), str):
                shown["token"] = "<TOKEN>"
            self.teacher_model_init_kwargs = shown
        try:
            values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        finally:
            self.teacher_model_init_kwargs = given
        return values


@dataclass
class DKDTrainingArguments(DKDArgumentsMixin, TrainingArguments):
    """`TrainingArguments` with the fields of `DKDArgumentsMixin`."""


@dataclass
class DKDSeq2SeqTrainingArguments(DKDArgumentsMixin, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the fields of `DKDArgumentsMixin`."""


def _expected_range(name: str) -> str:
    return "above 0" if name == "dkd_temperature" else "of 0 or above"
