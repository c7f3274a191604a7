"""The distillation objective on rows, as sums, and the running terms that are logged."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from .classes import Rows
from .losses.chunked import weighted_rows
from .losses.row_pass import STUDENT_MASKS, TEACHER_UNUSABLE, Partition, RowTerms, Weights
from .losses.standardized import standardized
from .losses.truncated_pass import weighted_top_rows
from .rows import IGNORE_INDEX
from .training_args import DKDArgumentsMixin


class Distilled(NamedTuple):
    """What the rows of a micro-batch come to, all but `loss` without gradient."""

    loss: Tensor
    """scale·(ce_weight·CE + weight·DKD), summed over the rows."""
    terms: dict[str, Tensor]
    """Sums over the rows, scalars: `dkd`, with its weight and T²; `tckd` and `nckd`, or what takes their place where
    the classes are divided otherwise; `teacher_agreement`; with `dkd_top_k` also `top_k`; `ce`, 0 without a weight.
    Rows of one example count by their mean."""
    unusable_teacher: Tensor
    """(R,) booleans: the teacher's row cannot be distilled, whatever the student learned."""
    masking_student: Tensor
    """(R,) booleans: the student masks (-inf) a class to which the teacher gives mass."""


def distil(
    rows: Rows,
    settings: DKDArgumentsMixin,
    *,
    weight: float = 1.0,
    ce_weight: float | None = None,
    scale: Tensor | float = 1.0,
) -> Distilled:
    """The objective of `rows` by the `settings`: their weights times `weight`. Nothing is read from an accelerator."""
    student, teacher = rows.student, rows.teacher
    if settings.dkd_standardize:
        # Rows without a label may hold anything, of which no gradient must come.
        student, teacher = (
            standardized(logits.masked_fill((rows.labels == IGNORE_INDEX).unsqueeze(1), 0.0))
            for logits in (student, teacher)
        )
    weights, scale = row_weights(settings, weight, ce_weight), scale / rows.per_example
    if rows.top is not None and rows.positions is not None:
        loss, found = weighted_top_rows(student, rows.top, rows.labels, rows.positions, weights, scale=scale)
        return distilled(loss, found, settings)
    loss, found = weighted_rows(
        student,
        teacher,
        rows.labels,
        weights,
        partition_of(rows, settings, weight),
        scale=scale,
    )
    if settings.dkd_standardize:
        # Z-scores may tell no class from another where the models themselves do.
        found = found._replace(agrees=rows.agreement() & (rows.labels != IGNORE_INDEX))
    return distilled(loss, found, settings, rows.per_example)


def row_weights(settings: DKDArgumentsMixin, weight: float, ce_weight: float | None = None) -> Weights:
    """The weights of the loss of a row."""
    alpha, beta = weight * settings.dkd_alpha, weight * settings.dkd_beta
    return Weights(alpha, beta, settings.dkd_temperature, ce_weight, settings.distillation == "kd")


def partition_of(rows: Rows, settings: DKDArgumentsMixin, weight: float) -> Partition | None:
    """How the classes are divided, if not into target and rest."""
    if not settings.dkd_top_k and rows.mixed is None:
        return None
    second = weight * settings.dkd_top_k_beta if settings.dkd_top_k else 0.0
    return Partition(settings.dkd_top_k, rows.mixed, second)


def distilled(loss: Tensor, found: RowTerms, settings: DKDArgumentsMixin, per_example: int = 1) -> Distilled:
    """A loss beside the sums of its terms."""
    sums = {
        "dkd": found.dkd,
        "tckd": found.tckd,
        "nckd": found.nckd,
        "teacher_agreement": found.agrees,
        **({"top_k": found.second} if settings.dkd_top_k else {}),
        "ce": found.ce,
    }
    terms = {name: values.sum() / per_example for name, values in sums.items()}
    return Distilled(loss, terms, found.fault == TEACHER_UNUSABLE, found.fault == STUDENT_MASKS)


def step_scale(total: Tensor | int, processes: int) -> Tensor | float:
    """What a sum over a process's rows is multiplied by, so that the processes' average is a mean over `total` rows."""
    return processes / (total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1))


def share_of_step(mean: Tensor, count: Tensor, scale: Tensor | float) -> Tensor:
    """A mean over `count` rows as its share of the optimizer step: exactly 0 where no row made the mean NaN."""
    return torch.where(count > 0, mean, 0.0) * count * scale


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (..., C) at labels (...), summed over the rows not labelled -100, in fp32 or more."""
    rows, dtype = logits.flatten(0, -2), torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(rows.to(dtype), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def mixed_cross_entropy_sum(logits: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of logits (N, C) with the class weights of mixed examples (N, C), summed, in fp32 or more."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(dtype), weights.to(dtype), label_smoothing=smoothing, reduction="sum")


class RunningTerms:
    """Sums of named scalars, kept on their device until they are asked for, on every process at once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, terms: Mapping[str, Tensor], counts: Tensor | bool = True, steps: int = 0) -> None:
        """Add one scalar to each named sum. Nothing is read from the device.

        Where `counts` is False, the mean over the `steps` so far is added instead, as Trainer's
        `logging_nan_inf_filter` does with a loss that is not finite.
        """
        for name, term in terms.items():
            value = term.detach().double() if term.device.type == "cpu" else term.detach().float()
            before = self._sums.get(name, torch.zeros_like(value))
            if isinstance(counts, Tensor):
                value = torch.where(counts, value, before / (1 + steps))
            self._sums[name] = before + value

    def drain(self, accelerator: Accelerator, reduction: str = "mean") -> dict[str, float]:
        """The sums, reduced over processes (`"mean"` or `"sum"`), and start again from none. A collective call."""
        names = list(self._sums)
        totals = accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction=reduction)
        self._sums = {}
        return dict(zip(names, totals.tolist(), strict=True))
