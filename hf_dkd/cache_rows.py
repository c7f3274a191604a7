"""A batch → what is kept of the teacher's outputs for each of its examples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from datasets import List, Value
from torch import Tensor

from . import cache_format as layout
from . import classes, rows
from .cache_format import ArrayColumn, Manifest
from .fingerprint import teacher_fingerprint
from .heads import Head
from .losses.truncated import top_outputs
from .targets import PER_EXAMPLE
from .teacher import Teacher

_PACKAGES = ("torch", "transformers", "datasets")
# Logits of a large vocabulary are ranked this many tokens at a time: copies of all would take several times the batch.
_ROWS_AT_A_TIME = 1024
_LABELS = ("labels",)


@dataclass
class OutputsOfTeacher:
    """Runs the teacher on batches and keeps what `top_k`, `temperature` and `dtype` say; see `cache_teacher_outputs`.

    `order` is the teacher's column for each class of the labels, `num_classes` how many columns count.
    """

    teacher: Teacher
    head: Head
    device: torch.device
    top_k: int | None
    temperature: float
    dtype: str
    num_classes: int | None
    order: Tensor | None

    def describe(self, batch: Mapping[str, Any], class_names: list[str] | None, num_views: int | None) -> Manifest:
        """What the outputs come from, with the columns and classes that a first batch tells."""
        labelled = rows.has_labels(self.head, batch, _LABELS)
        if self.top_k is not None and not labelled:
            raise ValueError("top_k keeps each target's own logit, but the batches have no labels: leave top_k out.")
        labels = (*rows.label_columns(self.head, _LABELS), "shift_labels") if labelled else ()
        classes_of_teacher = self._logits(batch).shape[-1]
        if self.top_k is not None and self.top_k > classes_of_teacher:
            raise ValueError(f"top_k is {self.top_k} for {classes_of_teacher} classes; leave it out for all of them.")
        return Manifest(
            teacher=self.teacher.name,
            fingerprint=teacher_fingerprint(self.teacher),
            head=str(self.head),
            columns=layout.checked_columns(batch, self.teacher.columns_in(batch), labels),
            labelled=labelled,
            num_classes=classes_of_teacher,
            class_names=class_names,
            top_k=self.top_k,
            temperature=1.0 if self.top_k is None else float(self.temperature),
            dtype=self.dtype,
            num_views=num_views,
            versions={name: version(name) for name in _PACKAGES},
        )

    def columns(self, batch: Mapping[str, Any], manifest: Manifest) -> dict[str, list[np.ndarray]]:
        """The columns of `manifest.features()`, an array for each example."""
        logits = self._logits(batch)
        kept = layout.places(self.head, batch, manifest.labelled, _LABELS)
        if kept is None:
            values = {layout.LOGITS: self._checked(logits)}
            examples = {name: list(value) for name, value in values.items()}
        else:
            if kept.shape != logits.shape[:-1]:
                raise ValueError(
                    f"The teacher's logits have shape {tuple(logits.shape)} for labels of shape {tuple(kept.shape)}: "
                    "expected one row of logits for each label."
                )
            values = self._of_tokens(logits.flatten(0, -2), batch, kept)
            ends = kept.sum(1).cumsum(0)[:-1].tolist()
            examples = {name: np.split(value, ends) for name, value in values.items()}
        checks = layout.row_checks(batch, manifest.columns)
        missing = [name for name in manifest.columns if name not in checks]
        if missing:
            raise ValueError(f"The first batch had the columns {', '.join(missing)}, but a later one has not.")
        examples[layout.CHECK] = list(np.array([checks[name] for name in manifest.columns], np.uint32).T)
        return examples

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        logits = self.teacher.logits(moved)
        expected = 2 if self.head in PER_EXAMPLE else 3
        if logits.ndim != expected:
            raise ValueError(
                f"The teacher's logits have shape {tuple(logits.shape)}; a {self.head} head has {expected} dimensions: "
                "head=... tells another kind."
            )
        return classes.in_order(logits, self.order)[..., : self.num_classes]

    def _of_tokens(self, logits: Tensor, batch: Mapping[str, Any], kept: Tensor) -> dict[str, np.ndarray]:
        positions = kept.flatten().nonzero().squeeze(1)
        if self.top_k is None:
            return {layout.LOGITS: self._checked(logits[positions.to(logits.device)])}
        labels = rows.aligned_labels(self.head, batch, _LABELS).flatten()[positions].long()
        classes.check_labels(labels, logits.shape[1])
        width = (layout.TOP_LOGITS, (self.top_k,), self.dtype), (layout.TOP_INDICES, (self.top_k,), "int64")
        parts: dict[str, list[np.ndarray]] = {name: [np.zeros((0, *shape), dtype)] for name, shape, dtype in width}
        parts |= {name: [np.zeros(0, np.float32)] for name in (layout.TARGET, layout.REST)}
        for chosen, targets in zip(positions.split(_ROWS_AT_A_TIME), labels.split(_ROWS_AT_A_TIME), strict=True):
            of_rows, targets = logits[chosen.to(logits.device)], targets.to(logits.device)
            _refuse_useless(of_rows)
            top = top_outputs(of_rows, targets, self.top_k, temperature=self.temperature)
            parts[layout.TOP_LOGITS].append(self._checked(top.logits))
            parts[layout.TOP_INDICES].append(top.indices.cpu().numpy())
            parts[layout.TARGET].append(top.target.float().cpu().numpy())
            parts[layout.REST].append(top.rest.float().cpu().numpy())
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _checked(self, logits: Tensor) -> np.ndarray:
        """`logits` in the cache's dtype, refused where they do not fit it."""
        _refuse_useless(logits)
        values = logits.detach().float().cpu().numpy()
        largest = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0)
        if largest > np.finfo(self.dtype).max:
            raise ValueError(
                f"The teacher emitted a logit of size {largest:g}; {self.dtype} ends at "
                f'{np.finfo(self.dtype).max:g}: cache with dtype="float32".'
            )
        return values.astype(self.dtype)


def _refuse_useless(logits: Tensor) -> None:
    if (logits.isnan() | (logits == torch.inf)).any():
        raise ValueError(
            "The teacher emitted NaN or +inf, which cannot be distilled: check its dtype (float16 overflows), its "
            "weights and the inputs."
        )


def collate_twice(collate: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """A batch that is made twice, and refused where the two differ."""
    batch, again = collate(), collate()
    name = layout.first_difference(batch, again)
    if name is not None:
        raise ValueError(
            f"Collated twice, the first batch has different {name}: the data is augmented or masked at random, so that "
            "the student would not see what the teacher saw. Cache data that stays the same (masks drawn once in a "
            "map, no augmentation), or a fixed number of random views with num_views=..., which are stored with the "
            "teacher's outputs; or train with the live teacher."
        )
    return batch


def view_features(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The columns in which the examples of a batch are stored as the teacher saw them."""
    features: dict[str, Any] = {}
    for name, arrays in view_columns(batch).items():
        dtype, dims = str(arrays[0].dtype), arrays[0].ndim
        if dims < 2:
            features[name] = List(Value(dtype)) if dims else Value(dtype)
        else:
            features[name] = ArrayColumn([-1, *arrays[0].shape[1:]], dtype)
    return features


def view_columns(batch: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
    """The examples of a batch, without padding, by column."""
    columns = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim:
            whole = value.float() if value.dtype == torch.bfloat16 else value
            columns[name] = [row.cpu().numpy() for row in layout.without_padding(name, batch, whole)]
    return columns
