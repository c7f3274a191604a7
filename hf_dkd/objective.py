"""The distillation objective on rows, as sums, and the running terms that are logged."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from .classes import Rows
from .losses.arithmetic import student_masks_mass
from .losses.decoupled import row_divergences, row_kl, unusable_teacher_rows, weighted_sum
from .losses.grouped import mixed_groups, row_grouped_kl, top_k_groups, weighted_groups
from .losses.standardized import standardized
from .rows import IGNORE_INDEX
from .training_args import DKDArgumentsMixin


class DistillationSums(NamedTuple):
    """Sums over the labelled rows, scalars; `dkd` alone carries a gradient. Rows of one example count by their mean."""

    dkd: Tensor
    """The weighted divergences times T², without the warm-up weight."""
    tckd: Tensor
    """TCKD; of mixed examples the divergence between the two classes and the rest, with `dkd_top_k` that between the
    teacher's first class, its next ones, and the rest."""
    nckd: Tensor
    """NCKD: the divergence among the rest."""
    teacher_agreement: Tensor
    """Rows where the argmaxes of student and teacher are the same class."""
    top_k: Tensor | None = None
    """With `dkd_top_k`, the divergence among the teacher's second to k-th class."""

    def named(self) -> dict[str, Tensor]:
        """By name, without what the settings do not have."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def distillation_sums(rows: Rows, settings: DKDArgumentsMixin) -> DistillationSums:
    """The distillation term of `rows` and its parts, at the temperature and weights of `settings`."""
    student, teacher, labels, mixed = rows[:4]
    labelled, labels = labels != IGNORE_INDEX, labels.clamp(min=0)
    temperature, top_k = settings.dkd_temperature, None
    if settings.dkd_standardize:
        student, teacher = standardized(student), standardized(teacher)
    divided = student.detach() if settings.distillation == "kd" else student
    groups = None if mixed is None else mixed_groups(mixed)
    if settings.dkd_top_k:
        groups = top_k_groups(teacher, settings.dkd_top_k)
    if groups is not None:
        parts = row_grouped_kl(divided, teacher, groups, 3, temperature=temperature)
        terms = weighted_groups(parts, settings.dkd_alpha, (0.0, settings.dkd_top_k_beta, settings.dkd_beta))
        tckd, (_, second, nckd) = parts.between, parts.within.unbind(1)
        top_k = second if settings.dkd_top_k else None
    else:
        tckd, nckd = row_divergences(divided, teacher, labels, temperature=temperature)
        terms = weighted_sum(tckd, nckd, settings.dkd_alpha, settings.dkd_beta)
    if settings.distillation == "kd":
        terms = settings.dkd_alpha * row_kl(student, teacher, temperature=temperature)

    def total(values: Tensor) -> Tensor:
        return torch.where(labelled, values, 0.0).sum() / rows.per_example

    return DistillationSums(
        dkd=temperature**2 * total(terms),
        tckd=total(tckd.detach()),
        nckd=total(nckd.detach()),
        teacher_agreement=total(rows.agreement().float()),
        top_k=None if top_k is None else total(top_k.detach()),
    )


def unusable_teacher(rows: Rows) -> Tensor:
    """(R,) booleans: the teacher's row cannot be distilled, whatever the student learned."""
    labelled, labels = rows.labels != IGNORE_INDEX, rows.labels.clamp(min=0)
    return unusable_teacher_rows(rows.teacher, labels) & labelled


def masking_student(rows: Rows) -> Tensor:
    """(R,) booleans: the student masks (-inf) a class to which the teacher gives mass."""
    return student_masks_mass(rows.student, rows.teacher) & (rows.labels != IGNORE_INDEX)


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
