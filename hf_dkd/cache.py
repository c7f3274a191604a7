"""A teacher that runs once: its outputs written beside the data, in whole shards, on any number of processes."""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, load_from_disk
from datasets.fingerprint import generate_random_fingerprint
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, default_data_collator, set_seed

from . import cache_format as layout
from . import classes
from .cache_format import ArrayColumn, Manifest
from .cache_rows import OutputsOfTeacher, collate_twice, view_columns, view_features
from .heads import Head, head_of
from .targets import PER_EXAMPLE
from .teacher import TEACHER_PREFIX, Teacher

_MANIFEST = "teacher_manifest.json"
# What a kill can cost: a shard is at most about this many bytes, and this many batches.
_SHARD_BYTES, _SHARD_BATCHES = 64 * 2**20, 256
_ALWAYS_KEPT = ("label", "labels", "label_ids", "input_ids", "pixel_values", "input_values", "input_features")


def cache_teacher_outputs(
    teacher: nn.Module | str | os.PathLike | Teacher,
    dataset: Dataset | IterableDataset,
    output_dir: str | os.PathLike,
    *,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    top_k: int | None = None,
    temperature: float = 1.0,
    dtype: str = "float16",
    num_views: int | None = None,
    label_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    head: str | None = None,
    remove_unused_columns: bool = True,
    num_workers: int = 0,
) -> Dataset:
    """Run the teacher over a data set once; `DKDTrainer(model, args, train_dataset=cached)` then needs no teacher.

    The result has the columns of `dataset` and the teacher's: `teacher_logits`, (C,) for an example of a classifier,
    (R, C) for the R tokens with a label (without any labels, all that the attention mask lets see). With `top_k`, for
    token heads, `teacher_top_logits` (R, k) and `teacher_target_logits` (R,), both less the row's largest logit,
    `teacher_top_indices` (R, k), and `teacher_rest` (R,): log-sum-exp at `temperature` of all other classes; see
    `hf_dkd.losses.truncated`. Each row carries checksums of its labels and of what the teacher read, and the columns a
    manifest, so that a cache is refused where it does not fit.

    Under `accelerate launch` every process writes shards of its own. Shards are written whole or not at all: after a
    kill the same call goes on where they end. `datasets.load_from_disk(output_dir)` opens the result later.

    Args:
        teacher: a module, a path or Hub id, or a `Teacher`.
        dataset: with an order of its own; a stream is read in order by every process.
        output_dir: a folder that all processes see.
        data_collator: the one that the training uses; by default `default_data_collator`.
        batch_size: of each process.
        top_k: how many logits of each token are kept; by default all of them.
        temperature: T of the rest beside the top k; training at another `dkd_temperature` is then refused.
        dtype: of the logits, "float16" or "float32".
        num_views: for data that is augmented or masked at random: the data set comes back this many times over, each
            view with the inputs that the teacher saw in place of the columns of `dataset`. By default refused.
        label_names: the names of the classes as the labels number them, where the teacher has another order.
        num_classes: how many of the vocabulary's rows count, where the student has fewer padding rows than the teacher.
        head: the kind of head, where the architecture does not tell.
        remove_unused_columns: keep columns that the teacher does not read from the collator, as Trainer does.
        num_workers: processes that load and collate the examples.

    Raises:
        ValueError: for settings out of range; random data without `num_views`; a teacher whose logits overflow `dtype`
            or cannot be distilled; an `output_dir` that holds the outputs of another teacher, data set or setting.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f'dtype is {dtype!r}; expected "float16" or "float32".')
    if num_views is not None and num_views < 1:
        raise ValueError(f"num_views is {num_views}; expected 1 or more, or None for data that stays the same.")
    collator: Any = data_collator or default_data_collator
    if hasattr(collator, "for_training") and num_views is None:
        raise ValueError(
            f"{type(collator).__name__} mixes the examples of a batch, which is another one in every epoch: cache a "
            "fixed number of views with num_views=..., or train with the live teacher."
        )
    if layout.manifest_of(dataset) is not None:
        raise ValueError("The data set holds a teacher's outputs already: pass the one that it was made from.")
    teacher, state = _as_teacher(teacher), PartialState()
    known, order = _known_head(teacher, head, top_k), classes.class_order(label_names, teacher.class_names)
    in_order = None if order is None else torch.tensor(order, device=state.device)
    outputs = OutputsOfTeacher(teacher, known, state.device, top_k, temperature, dtype, num_classes, in_order)
    teacher.prepare(teacher.model if teacher.shares_student else nn.Module(), state.device)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {*teacher.columns, *(TEACHER_PREFIX + name for name in teacher.columns), *_ALWAYS_KEPT}
    kept |= {TEACHER_PREFIX + name for name in _ALWAYS_KEPT}

    def collate(examples: list[Any]) -> Mapping[str, Any]:
        if remove_unused_columns:
            examples = [{name: value for name, value in one.items() if name in kept} for one in examples]
        return getattr(collator, "for_training", collator)(examples)

    class_names = list(label_names) if label_names is not None else teacher.class_names
    return _Cache(outputs, dataset, folder, collate, batch_size, num_workers).run(class_names, num_views)


class _Cache:
    """The shards of one cache: which there are, which this process writes, and whether they belong together."""

    def __init__(
        self, outputs: OutputsOfTeacher, dataset: Any, folder: Path, collate: Any, batch_size: int, num_workers: int
    ) -> None:
        self.outputs, self.dataset, self.folder, self.collate = outputs, dataset, folder, collate
        self.batch_size, self.num_workers = batch_size, num_workers
        self.state = PartialState()
        self.rows = len(dataset) if isinstance(dataset, Dataset) else None

    def run(self, class_names: list[str] | None, num_views: int | None) -> Dataset:
        with _seeded(0):
            first = self._first_batch() if num_views is not None else collate_twice(self._first_batch)
        manifest = self.outputs.describe(first, class_names, num_views)
        self.manifest, self.rows_per_shard = self._settle(manifest, first)
        self.features = self._features(first)
        names: list[str] = []
        for view in range(num_views or 1):
            for index, chunk in enumerate(self._chunks()):
                name = f"shard-{view:03d}-{index:06d}.arrow"
                if len(names) % self.state.num_processes == self.state.process_index:
                    self._write(chunk, self.folder / name, seed=len(names))
                names.append(name)
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._join(names)
        self.state.wait_for_everyone()
        return self._with_format(load_from_disk(str(self.folder)))

    # ---- What belongs together ----

    def _settle(self, manifest: Manifest, first: Mapping[str, Any]) -> tuple[Manifest, int]:
        """The manifest and the rows of a shard: those of the folder, if they fit, or new ones."""
        path = self.folder / _MANIFEST
        if self.state.is_main_process:
            for left_over in self.folder.glob("*.tmp"):
                left_over.unlink()
            if not path.exists():
                settled = {"manifest": manifest.to_json(), "rows": self.rows, "rows_per_shard": self._shard_size(first)}
                _replace(path, json.dumps(settled, indent=2).encode())
        self.state.wait_for_everyone()
        settled = json.loads(path.read_text(encoding="utf-8"))
        written = Manifest.from_json(settled["manifest"])
        different = written.differences(manifest)
        if settled["rows"] != self.rows:
            different.append(f"rows {settled['rows']}, now {self.rows}")
        if different:
            raise ValueError(
                f"{self.folder} holds teacher outputs that do not go with these: {'; '.join(different)}. Give another "
                "output_dir, or remove that one."
            )
        return written, settled["rows_per_shard"]

    def _shard_size(self, first: Mapping[str, Any]) -> int:
        outputs = self.outputs.columns(first, self.outputs.describe(first, None, None))
        size = sum(array.nbytes for arrays in outputs.values() for array in arrays)
        batches = min(max(_SHARD_BYTES // max(size, 1), 1), _SHARD_BATCHES)
        if self.rows is not None:
            # So that every process has work.
            batches = min(batches, max(-(-self.rows // (self.batch_size * self.state.num_processes)), 1))
        return self.batch_size * batches

    def _check(self, chunk: Dataset, path: Path) -> None:
        """Refuse a shard whose first rows are not the first ones of `chunk`."""
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_stream(file).read_next_batch()
        column = self.features[layout.CHECK]
        stored = [column.decode_example(value).tolist() for value in batch[layout.CHECK].to_pylist()]
        examples = self.collate(chunk.__getitems__(list(range(len(stored)))))
        checks = layout.row_checks(examples, self.manifest.columns)
        if stored != [list(row) for row in zip(*(checks[name] for name in self.manifest.columns), strict=True)]:
            raise ValueError(
                f"{path} holds the teacher's outputs for other rows than those of the data set at its place: the data, "
                "its order or the collator changed. Give another output_dir, or remove that one."
            )

    # ---- Rows ----

    def _first_batch(self) -> Mapping[str, Any]:
        return self.collate(self._first_examples())

    def _first_examples(self) -> list[Any]:
        if isinstance(self.dataset, Dataset):
            examples = self.dataset.__getitems__(list(range(min(self.batch_size, len(self.dataset)))))
        else:
            examples = list(islice(self.dataset, self.batch_size))
        if not examples:
            raise ValueError("The data set is empty.")
        return examples

    def _chunks(self) -> Iterator[Dataset]:
        """The rows of each shard, in order."""
        size = self.rows_per_shard
        if isinstance(self.dataset, Dataset):
            for start in range(0, len(self.dataset), size):
                yield self.dataset.select(range(start, min(start + size, len(self.dataset))))
            return
        stream, features = iter(self.dataset), self.dataset.features
        while examples := list(islice(stream, size)):
            chunk = Dataset.from_list(examples, features=features)
            features = chunk.features
            yield chunk

    def _features(self, first: Mapping[str, Any]) -> Features:
        if self.manifest.num_views is not None:
            own = view_features(first)
        else:
            own = self.dataset.features or Dataset.from_list(self._first_examples()).features
        return Features({**own, **self.manifest.features()})

    def _write(self, chunk: Dataset, path: Path, seed: int) -> None:
        """Write a shard under a temporary name and rename it; leave one that is there."""
        if path.exists():
            if self.manifest.num_views is None:
                self._check(chunk, path)
            return
        temporary = path.with_suffix(".tmp")
        loader = DataLoader(
            chunk, self.batch_size, collate_fn=self.collate, num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        with _seeded(seed), temporary.open("wb") as file:
            with pa.ipc.new_stream(file, self.features.arrow_schema) as writer:
                for number, batch in enumerate(loader):
                    writer.write_table(self._table(chunk, number * self.batch_size, batch))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _table(self, chunk: Dataset, start: int, batch: Mapping[str, Any]) -> pa.Table:
        outputs = self.outputs.columns(batch, self.manifest)
        if self.manifest.num_views is None:
            table = chunk.with_format("arrow")[start : start + self.batch_size]
        else:
            table, outputs = pa.table({}), view_columns(batch) | outputs
        for name, arrays in outputs.items():
            feature, type_ = self.features[name], self.features.arrow_schema.field(name).type
            values = [feature.encode_example(one) for one in arrays] if isinstance(feature, ArrayColumn) else arrays
            table = table.append_column(name, pa.array(values, type_))
        return table.select(list(self.features)).cast(self.features.arrow_schema)

    # ---- The result ----

    def _join(self, names: list[str]) -> None:
        """Write what `load_from_disk` reads, the file that it looks for last."""
        state = self.folder / "state.json"
        if state.exists():
            return
        info = Dataset.from_dict({}, features=Features({})).info
        info.features = self.features
        info.write_to_directory(str(self.folder))
        content = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": generate_random_fingerprint(),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        _replace(state, json.dumps(content, indent=2).encode())

    def _with_format(self, cached: Dataset) -> Dataset:
        """`cached` with the format of the data set, whose transform is spared the teacher's columns."""
        form = getattr(self.dataset, "format", None)
        if self.manifest.num_views is not None or form is None or form["type"] is None:
            return cached
        if form["type"] == "custom":
            return cached.with_transform(_BesideTransform(form["format_kwargs"]["transform"]))
        return cached.with_format(form["type"], **form["format_kwargs"])


class _BesideTransform:
    """A transform on the fly for the data set's own columns; the teacher's stay as they are."""

    def __init__(self, transform: Callable[[dict[str, list]], dict[str, list]]) -> None:
        self.transform = transform

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        of_teacher = {name: rows[name] for name in layout.COLUMNS if name in rows}
        own = {name: value for name, value in rows.items() if name not in of_teacher}
        return {**self.transform(own), **of_teacher}


def _as_teacher(teacher: nn.Module | str | os.PathLike | Teacher) -> Teacher:
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return Teacher(teacher)
    config = AutoConfig.from_pretrained(teacher)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        raise ValueError(
            f"The config of {str(teacher)!r} names the architectures {config.architectures}, of which transformers has "
            "none: load the model yourself and pass it."
        )
    with torch.device("meta"):
        shape_only = model_class(config)
    return Teacher.from_pretrained(teacher, shape_only)


def _known_head(teacher: Teacher, told: str | None, top_k: int | None) -> Head:
    head = Head(told) if told is not None else head_of(teacher.model)
    if head is None:
        raise ValueError(
            f"{type(teacher.model).__name__} is not known to emit class or token logits: set head to one of "
            f"{', '.join(Head)}."
        )
    if head is Head.QUESTION_ANSWERING:
        raise ValueError("The classes of question answering are places in a batch, which a cache does not keep.")
    if top_k is not None and head in PER_EXAMPLE:
        raise ValueError(f"top_k is {top_k} for a {head} head, whose logits are kept whole: leave it out.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected 1 or more, or None for all logits.")
    return head


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same random numbers for a shard whichever process draws them, and the script's own ones afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
