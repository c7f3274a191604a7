"""The teacher's cached outputs beside the batch of a collator that knows nothing of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cache_format as layout
from .cache_format import Manifest
from .heads import Head

_STALE = (
    "The teacher did not see what the student is given now: in example {example} of the batch the column {column!r} is "
    "not the one that the outputs were cached with. Train with the data, the collator and the labels of the cache: no "
    "augmentation or masking drawn anew, no later map or truncation of that column (and an attention mask, where "
    "batches are padded)."
)


@dataclass
class CollatorWithTeacherOutputs:
    """Collates the teacher's cached outputs beside the batch of the script's own `collator`.

    They stand where the labels do, whatever side the collator pads. Examples without outputs are left to `collator`.

    Raises:
        ValueError: where an example is not the one that the outputs were cached with.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    manifest: Manifest
    label_names: Sequence[str]

    def __call__(self, examples: list[Any]) -> Mapping[str, Any]:
        if not any(name in examples[0] for name in layout.COLUMNS):
            return self.collator(examples)
        features = self.manifest.features()
        lacking = [name for name in features if any(one.get(name) is None for one in examples)]
        if lacking:
            raise ValueError(
                f"The examples lack {', '.join(lacking)} of the teacher's cached columns: let transforms keep them, "
                "and cache every data set that is joined with another."
            )
        batch = dict(self.collator([{k: v for k, v in one.items() if k not in features} for one in examples]))
        columns = {name: [np.asarray(one[name], kind.dtype) for one in examples] for name, kind in features.items()}
        self._check(batch, columns.pop(layout.CHECK))
        kept = layout.places(Head(self.manifest.head), batch, self.manifest.labelled, self.label_names)
        for name, values in columns.items():
            batch[name] = _tensor(np.stack(values)) if kept is None else _placed(values, kept)
        return batch

    def _check(self, batch: Mapping[str, Any], stored: list[np.ndarray]) -> None:
        for name, now in layout.row_checks(batch, self.manifest.columns).items():
            index = self.manifest.columns.index(name)
            for example, (checks, check) in enumerate(zip(stored, now, strict=True)):
                if checks[index] != check:
                    raise ValueError(_STALE.format(example=example, column=name))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32) if values.dtype.kind == "u" else values)


def _placed(values: list[np.ndarray], kept: Tensor) -> Tensor:
    """The rows of each example at the places that are kept, (B, L, …), and zeros elsewhere."""
    stored = np.array([len(one) for one in values])
    counts = kept.sum(1).cpu().numpy()
    if (stored != counts).any():
        example = int((stored != counts).argmax())
        raise ValueError(
            f"Example {example} of the batch has {counts[example]} tokens to distil, and outputs are cached for "
            f"{stored[example]}: the labels are not those of the cache."
        )
    rows = _tensor(np.concatenate(values))
    placed = rows.new_zeros(*kept.shape, *rows.shape[1:])
    placed[kept] = rows
    return placed
