"""The shards of a cache on disk: whole or not there, each written by one process, joined without being read."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset, Features, load_from_disk
from datasets.fingerprint import generate_random_fingerprint
from torch.utils.data import DataLoader
from transformers import set_seed

from . import cache_format as layout
from .cache_format import ArrayColumn, Manifest
from .cache_rows import OutputsOfTeacher, collate_twice, view_columns, view_features

_MANIFEST = "teacher_manifest.json"
# What a kill can cost: a shard is at most about this many bytes, and this many batches.
_SHARD_BYTES, _SHARD_BATCHES = 64 * 2**20, 256

# In the metadata of a shard: what its rows were.
_DIGEST = b"hf_dkd_rows"
_CHANGED = (
    "{path} holds the teacher's outputs for other rows than those of the data set at its place: the data, its columns, "
    "its order or the collator changed. Give another output_dir, or remove that one."
)


class Shards:
    """The shards of one cache: which there are, which this process writes, and whether they belong together."""

    def __init__(
        self, outputs: OutputsOfTeacher, dataset: Any, folder: Path, collate: Any, batch_size: int, num_workers: int
    ) -> None:
        self.outputs, self.dataset, self.folder, self.collate = outputs, dataset, folder, collate
        self.batch_size, self.num_workers = batch_size, num_workers
        self.state = processes()
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
                settled = {
                    "manifest": manifest.to_json(),
                    "rows": self.rows,
                    "rows_per_shard": self._shard_size(manifest, first),
                }
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

    def _shard_size(self, manifest: Manifest, first: Mapping[str, Any]) -> int:
        outputs = self.outputs.columns(first, manifest)
        size = sum(array.nbytes for arrays in outputs.values() for array in arrays)
        batches = min(max(_SHARD_BYTES // max(size, 1), 1), _SHARD_BATCHES)
        if self.rows is not None:
            # So that every process has work.
            batches = min(batches, max(-(-self.rows // (self.batch_size * self.state.num_processes)), 1))
        return self.batch_size * batches

    def _check(self, chunk: Dataset, path: Path) -> None:
        """Refuse a shard of other rows than those of `chunk`, or whose first batch is collated otherwise now."""
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_stream(file)
            same, batch = (reader.schema.metadata or {}).get(_DIGEST) == _digest(chunk), reader.read_next_batch()
        if not same:
            raise ValueError(_CHANGED.format(path=path))
        if self.manifest.num_views is not None:
            return
        column = self.features[layout.CHECK]
        stored = [column.decode_example(value).tolist() for value in batch[layout.CHECK].to_pylist()]
        examples = self.collate(chunk.__getitems__(list(range(len(stored)))))
        checks = layout.row_checks(examples, self.manifest.columns)
        if stored != [list(row) for row in zip(*(checks[name] for name in self.manifest.columns), strict=True)]:
            raise ValueError(_CHANGED.format(path=path))

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
            self._check(chunk, path)
            return
        temporary = path.with_suffix(".tmp")
        loader = DataLoader(
            chunk, self.batch_size, collate_fn=self.collate, num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        schema = self.features.arrow_schema
        schema = schema.with_metadata({**(schema.metadata or {}), _DIGEST: _digest(chunk)})
        with _seeded(seed), temporary.open("wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for number, batch in enumerate(loader):
                    table = self._table(chunk, number * self.batch_size, batch)
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _table(self, chunk: Dataset, start: int, batch: Mapping[str, Any]) -> pa.Table:
        outputs, columns = self.outputs.columns(batch, self.manifest), {}
        if self.manifest.num_views is None:
            table = chunk.with_format("arrow")[start : start + self.batch_size]
            columns = {name: table[name] for name in table.column_names}
        else:
            outputs |= view_columns(batch)
        for name, arrays in outputs.items():
            feature, kind = self.features[name], self.features.arrow_schema.field(name).type
            values = [feature.encode_example(one) for one in arrays] if isinstance(feature, ArrayColumn) else arrays
            columns[name] = pa.array(values, kind)
        return pa.table({name: columns[name] for name in self.features}).cast(self.features.arrow_schema)

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


def processes() -> PartialState:
    """The processes that accelerate started; without an accelerator it counts one, unless told that it is the CPU's."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _digest(chunk: Dataset) -> bytes:
    """Of all columns of the rows of `chunk`."""
    table, sink = chunk.with_format("arrow")[:].combine_chunks(), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None))
    return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest().encode()


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
