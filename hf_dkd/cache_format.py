"""How a teacher's outputs stand in a data set: columns of arrays, what they came from, and a check of every row."""

import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets.features.features import register_feature
from torch import Tensor

from . import rows, targets
from .heads import Head
from .teacher import TEACHER_PREFIX

LOGITS, TOP_LOGITS, TOP_INDICES = "teacher_logits", "teacher_top_logits", "teacher_top_indices"
TARGET, REST, CHECK = "teacher_target_logits", "teacher_rest", "teacher_check"
COLUMNS = (LOGITS, TOP_LOGITS, TOP_INDICES, TARGET, REST, CHECK)
# A row's check reads at most about this many numbers of each column: an image's would cost more than a step may.
_MOST_NUMBERS = 4096


@dataclass
class ArrayColumn:
    """A feature of `datasets` whose values are numpy arrays, stored as their bytes and so read without a conversion.

    Args:
        shape: of each row's array; -1 where it varies.
        dtype: numpy's name of it.
        manifest: what the values come from, as JSON: it goes where the column goes, through shuffle, select, map,
            save_to_disk, parquet and streams.
    """

    shape: list[int]
    dtype: str
    manifest: str = ""
    pa_type: ClassVar[Any] = pa.large_binary()
    _type: str = field(default="hf_dkd.ArrayColumn", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> bytes:
        """The bytes of an array, or of what numpy makes one of."""
        if isinstance(value, bytes):
            return value
        # Behind a last byte that is not 0: the numpy and torch formats of `datasets` drop zeros at the end.
        return np.ascontiguousarray(value, self.dtype).tobytes() + b"\x01"

    def decode_example(self, value: bytes, token_per_repo_id: Any = None) -> np.ndarray:
        """The array, which may be written to."""
        return np.frombuffer(bytearray(value[:-1]), self.dtype).reshape(self.shape)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    register_feature(ArrayColumn, "hf_dkd.ArrayColumn")


@dataclass(frozen=True)
class Manifest:
    """What cached outputs come from, and hold for."""

    teacher: str
    fingerprint: str
    """Of the teacher's weights and config."""
    head: str
    columns: list[str]
    """The columns that the row checks cover: what the teacher read, and the labels."""
    labelled: bool
    """Whether the rows are those with a label; without any labels they are all that the attention mask lets see."""
    num_classes: int
    class_names: list[str] | None
    top_k: int | None
    temperature: float
    """Of the rest beside the top k; dense logits hold for every one."""
    dtype: str
    num_views: int | None
    versions: dict[str, str] = field(compare=False)
    format: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        return cls(**json.loads(text))

    def differences(self, other: "Manifest") -> list[str]:
        """What `other` has instead, but for versions."""
        names = [one.name for one in fields(self) if one.compare]
        return [
            f"{name} {getattr(self, name)!r}, now {getattr(other, name)!r}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def features(self) -> dict[str, ArrayColumn]:
        """The columns of the outputs."""
        each = [-1] if Head(self.head) not in targets.PER_EXAMPLE else []
        if self.top_k is None:
            columns = {LOGITS: ([*each, self.num_classes], self.dtype)}
        else:
            of_index = "uint16" if self.num_classes <= 2**16 else "uint32"
            columns = {
                TOP_LOGITS: ([*each, self.top_k], self.dtype),
                TOP_INDICES: ([*each, self.top_k], of_index),
                TARGET: (each, "float32"),
                REST: (each, "float32"),
            }
        columns[CHECK] = ([len(self.columns)], "uint32")
        return {name: ArrayColumn(shape, dtype, self.to_json()) for name, (shape, dtype) in columns.items()}


def manifest_of(dataset: Any) -> Manifest | None:
    """What the teacher outputs in a data set of the library `datasets` come from; None where it holds none."""
    features = getattr(dataset, "features", None)
    values = features.values() if isinstance(features, Mapping) else ()
    texts = [value.manifest for value in values if isinstance(value, ArrayColumn) and value.manifest]
    return Manifest.from_json(texts[0]) if texts else None


def places(head: Head, batch: Mapping[str, Any], labelled: bool, label_names: Sequence[str]) -> Tensor | None:
    """(B, L) booleans: the tokens whose outputs are kept. None for heads with one row an example."""
    if head in targets.PER_EXAMPLE:
        return None
    if labelled:
        return rows.aligned_labels(head, batch, label_names) != rows.IGNORE_INDEX
    return targets.distilled(head, batch, label_names)[1]


def row_checks(batch: Mapping[str, Any], columns: Sequence[str]) -> dict[str, list[int]]:
    """For each of `columns` that the batch has, a checksum of each example, padding left out."""
    return {name: _checksums(name, batch) for name in columns if batch.get(name) is not None}


def checked_columns(batch: Mapping[str, Any], read: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The columns that `row_checks` is to cover, of those that the teacher read and the labels."""
    # Masks tell padding from text: other columns are compared where they let see.
    names = [name for name in dict.fromkeys((*read, *labels)) if not name.endswith("attention_mask")]
    return [name for name in names if isinstance(batch.get(name), Tensor)]


def without_padding(name: str, batch: Mapping[str, Any], values: Tensor) -> list[Tensor]:
    """The examples of the column `name`, whose `values` may be changed ones, without the padding."""
    prefix = TEACHER_PREFIX if name.startswith(TEACHER_PREFIX) else ""
    mask = batch.get(prefix + "attention_mask", batch.get("attention_mask"))
    if isinstance(mask, Tensor) and mask.ndim >= 2 and values.shape[: mask.ndim] == mask.shape:
        return [row[visible] for row, visible in zip(values, mask.bool(), strict=True)]
    if values.ndim == 2 and not values.is_floating_point():
        # Labels of a decoder, whose padding is -100.
        return [row[_without_ends(row)] for row in values]
    return list(values)


def _checksums(name: str, batch: Mapping[str, Any]) -> list[int]:
    values = batch[name].float() if batch[name].is_floating_point() else batch[name].long()
    return [_checksum(row.flatten()) for row in without_padding(name, batch, values)]


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row[:: max(1, len(row) // _MOST_NUMBERS)].contiguous().cpu().numpy().tobytes())


def _without_ends(labels: Tensor) -> slice:
    kept = (labels != rows.IGNORE_INDEX).nonzero()
    return slice(int(kept[0]), int(kept[-1]) + 1) if len(kept) else slice(0, 0)


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first column in which two batches differ."""
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = a.shape == b.shape and torch.equal(a, b)
        else:
            same = np.array_equal(np.asarray(a, dtype=object), np.asarray(b, dtype=object))
        if not same:
            return name
    return None


def without_teacher_inputs(cached: Any) -> Any:
    """`cached`, a data set or splits, without the columns that the teacher alone read, such as its own tokens."""
    splits = cached if isinstance(cached, dict) else {"": cached}
    own = {name for split in splits.values() for name in split.column_names if name.startswith(TEACHER_PREFIX)}
    return cached.remove_columns([name for name in own if name not in COLUMNS])
