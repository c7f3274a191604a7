"""A teacher that has run: its outputs read from the columns that `cache_teacher_outputs` wrote."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor, nn
from torch.utils.data import Subset

from . import cache_format as layout
from . import classes
from .cache_format import Manifest, manifest_of
from .cached_collator import CollatorWithTeacherOutputs
from .fingerprint import teacher_fingerprint
from .heads import Head
from .language_head import Trial
from .losses.truncated import TopOutputs
from .rows import IGNORE_INDEX, check_beside
from .targets import PER_EXAMPLE
from .teacher import Teacher
from .training_args import DKDArgumentsMixin


class CachedTeacher(Teacher):
    """The teacher whose outputs stand in a data set. `DKDTrainer` makes it of a cached `train_dataset` by itself.

    Args:
        cached: what `cache_teacher_outputs` returned, or its manifest.
        live: the model too, which then runs on batches without cached outputs, such as those of an evaluation.

    Raises:
        ValueError: for a data set without a teacher's outputs, or another live teacher than theirs.
    """

    def __init__(self, cached: Any, live: Teacher | None = None) -> None:
        manifest = cached if isinstance(cached, Manifest) else manifest_of(cached)
        if manifest is None:
            raise ValueError("The data set holds no outputs of a teacher: make it with cache_teacher_outputs.")
        fingerprint = None if live is None else teacher_fingerprint(live)
        if live is not None and fingerprint != manifest.fingerprint:
            raise ValueError(
                f"The data set holds the outputs of {manifest.teacher!r} (fingerprint {manifest.fingerprint}), and the "
                f"teacher is {live.name!r} (fingerprint {fingerprint}), of other weights or another config. Leave the "
                "teacher out to train on what is cached, or cache this one's outputs."
            )
        self.manifest, self.live, self.shares_student, self.is_compiled = manifest, live, False, False
        self.columns = [*layout.COLUMNS, *manifest.columns]
        if live is not None:
            self.columns += live.columns

    @property
    def name(self) -> str:
        """The name that the teacher had when it ran."""
        return self.manifest.teacher

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the live teacher."""
        return None if self.live is None else self.live.dtype

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in the order of the cached logits."""
        return self.manifest.class_names

    def prepare(self, student: nn.Module, device: torch.device, compiled: bool = False) -> None:
        """Place the live teacher, if there is one."""
        if self.live is not None:
            self.live.prepare(student, device, compiled)

    def trial(self, batch: Mapping[str, Any], half_precision: bool = False) -> Trial:
        """No hidden states are cached."""
        return Trial(None, False, "its outputs are cached")

    def columns_in(self, batch: Mapping[str, Any]) -> list[str]:
        """The cached columns of `batch`, or what the live teacher reads of it."""
        cached = [name for name in layout.COLUMNS if name in batch]
        return cached if cached or self.live is None else self.live.columns_in(batch)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the live teacher reads of `batch`."""
        if self.live is None:
            raise ValueError(
                f"The batch has no cached outputs of {self.name!r}, which is not loaded: its columns are "
                f"{', '.join(batch)}. Cache this data set's too, or give the teacher beside the cached data."
            )
        return self.live.inputs(batch)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The cached logits in `batch`, zeros where none are kept; of a batch without any the live teacher's."""
        if batch.get(layout.LOGITS) is not None:
            return batch[layout.LOGITS]
        self.inputs(batch)
        assert self.live is not None
        return self.live.logits(batch)


def with_cached_outputs(trainer: Any, teacher: Teacher | None) -> Teacher | None:
    """The trainer's teacher: the cached one, if its data sets hold outputs, whose collator then reads them."""
    sets = trainer.eval_dataset
    sets = [trainer.train_dataset, *(sets.values() if isinstance(sets, dict) else [sets])]
    sets = [one.dataset if isinstance(one, Subset) else one for one in sets]
    manifests = [manifest for one in sets if (manifest := manifest_of(one)) is not None]
    if isinstance(teacher, CachedTeacher):
        manifests.insert(0, teacher.manifest)
    elif any(layout.CHECK in _columns(one) for one in sets) and not manifests:
        raise ValueError(
            "The data set holds a teacher's outputs, but a map that returned their columns took away what tells where "
            "they come from: return the new columns alone, or pass teacher=CachedTeacher(cached), with cached the data "
            "set before that map."
        )
    if not manifests:
        return teacher
    manifest = manifests[0]
    for other in manifests[1:]:
        if different := manifest.differences(other):
            raise ValueError(f"The data sets hold different teacher outputs: {'; '.join(different)}.")
    if hasattr(trainer.data_collator, "for_training"):
        raise ValueError(
            f"{type(trainer.data_collator).__name__} mixes examples anew for every batch, of which the cached teacher "
            "knows nothing: train with the collator of the cache, or with the live teacher."
        )
    trainer.data_collator = CollatorWithTeacherOutputs(trainer.data_collator, manifest, trainer.label_names)
    return teacher if isinstance(teacher, CachedTeacher) else CachedTeacher(manifest, teacher)


def _columns(dataset: Any) -> Collection[str]:
    columns = getattr(dataset, "column_names", None)
    if columns is None and isinstance(dataset, IterableDataset):
        # After a map a stream knows its columns no more.
        columns = next(iter(dataset), {}).keys()
    return columns or ()


def check_cache(teacher: Teacher, head: Head, settings: DKDArgumentsMixin, order: Sequence[int] | None) -> None:
    """Raise a `ValueError` where what is cached does not go with the student's head, classes or the settings."""
    if not isinstance(teacher, CachedTeacher):
        return
    manifest = teacher.manifest
    cached = Head(manifest.head)
    if cached is not head and not (cached in PER_EXAMPLE and head in PER_EXAMPLE):
        raise ValueError(f"The cached outputs are those of a {cached} head, and the student has a {head} head.")
    if settings.dkd_target == "teacher" and manifest.labelled and cached not in PER_EXAMPLE:
        raise ValueError('dkd_target is "teacher", but outputs are cached for the tokens with a label alone.')
    if manifest.top_k is None:
        return
    if settings.dkd_temperature != manifest.temperature:
        raise ValueError(
            f"dkd_temperature is {settings.dkd_temperature:g}, but what is cached beside the top {manifest.top_k} "
            f"logits holds for {manifest.temperature:g} alone: train at that one, or cache with "
            f"temperature={settings.dkd_temperature:g}."
        )
    for name in ("dkd_standardize", "dkd_top_k"):
        if getattr(settings, name):
            raise ValueError(f"{name} needs all logits, and {manifest.top_k} of each token are cached: leave it out.")
    if order is not None:
        raise ValueError(
            "The student has the classes in another order than the cached outputs, whose targets' logits were taken in "
            "that one: cache with label_names=[...], the student's names in their order."
        )


def has_logits(trainer: Any, batch: Mapping[str, Any]) -> bool:
    """Whether the teacher's logits of `batch` can be had, all of each row; what lacks them is said once."""
    teacher = trainer.teacher
    return teacher is not None and (
        not isinstance(teacher, CachedTeacher) or layout.LOGITS in batch or _runs(trainer, teacher, batch)
    )


def has_outputs(trainer: Any, batch: Mapping[str, Any]) -> bool:
    """Whether the teacher's terms of `batch` can be computed."""
    return layout.TOP_LOGITS in batch or has_logits(trainer, batch)


def _runs(trainer: Any, teacher: CachedTeacher, batch: Mapping[str, Any]) -> bool:
    if layout.TOP_LOGITS in batch:
        return False
    if teacher.live is None:
        trainer._say(
            "No outputs of the teacher are cached for the data that is evaluated: the terms with the teacher are left "
            "out. Cache them too, or give the teacher beside the cached data."
        )
    return teacher.live is not None


def top_rows(batch: Mapping[str, Any], labels: Tensor) -> TopOutputs | None:
    """The cached top k of the labelled tokens; None where the batch has none. Finding them reads the device."""
    if batch.get(layout.TOP_LOGITS) is None:
        return None
    positions = _labelled(labels)
    columns = (batch[name] for name in (layout.TOP_LOGITS, layout.TOP_INDICES, layout.TARGET, layout.REST))
    logits, indices, target, rest = (values.flatten(0, 1).index_select(0, positions) for values in columns)
    return TopOutputs(logits, indices.long(), target, rest)


def number_of_classes(teacher: Teacher, rows: Tensor | TopOutputs) -> int:
    """Of the teacher's rows, of which not all may be kept."""
    if isinstance(rows, Tensor):
        return rows.shape[1]
    assert isinstance(teacher, CachedTeacher)
    return teacher.manifest.num_classes


def _labelled(labels: Tensor) -> Tensor:
    return (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)


def aligned_rows(teacher: Teacher, student: Tensor, top: TopOutputs, labels: Tensor) -> classes.Rows:
    """The student's logits (B, L, C) as rows, beside the teacher's `top` of those with a label."""
    assert isinstance(teacher, CachedTeacher)
    positions = _labelled(labels)
    check_beside(student, labels, "student")
    manifest, number = teacher.manifest, student.shape[-1]
    size, head = manifest.num_classes, Head(manifest.head)
    padded = head.has_vocabulary and classes.differ_in_padding(number, size)
    if padded and number < size:
        raise ValueError(
            f"The student has {number} rows in its vocabulary, and the cached outputs are over {size}, whose padding "
            f"rows are in the mass of the rest: cache with num_classes={number}."
        )
    if number != size and not padded:
        raise ValueError(classes.other_classes(head, number, size))
    labels = labels.flatten().index_select(0, positions).long()
    classes.check_labels(labels, size)
    student = student.flatten(0, -2)
    # Whole, a slice would still copy the gradient.
    student = student[:, :size] if number > size else student
    return classes.Rows(student, top.logits, labels, top=top, positions=positions)
