"""Writing a cache: what stands in its columns, what travels with it, what is refused, and going on after a kill."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from torch import nn

from hf_dkd import CachedTeacher, Teacher, cache_teacher_outputs
from hf_dkd.cache_format import ArrayColumn, manifest_of
from hf_dkd.fingerprint import teacher_fingerprint
from hf_dkd.rows import aligned_labels

from . import killed_cache
from .cache_helpers import cached, logits_of_teacher, rows_of
from .models import ARCHITECTURES

ROOT = Path(__file__).parents[1]


# --- Columns ---


@pytest.mark.parametrize("name", ["bert", "vit", "bert_choice"])
def test_a_classifiers_logits_are_kept_whole(name: str, tmp_path: Path) -> None:
    data = rows_of(name)
    result = cached(tmp_path, name)
    assert result.column_names == [*data.column_names, "teacher_logits", "teacher_check"]
    assert result.remove_columns(["teacher_logits", "teacher_check"])[:] == data[:]
    np.testing.assert_allclose(np.stack(result["teacher_logits"]), logits_of_teacher(name), atol=1e-6)


@pytest.mark.parametrize("name", ["bert_tokens", "bert_mlm", "llama", "t5"])
def test_of_tokens_those_with_a_label_are_kept(name: str, tmp_path: Path) -> None:
    architecture, result = ARCHITECTURES[name], cached(tmp_path, name)
    labels = aligned_labels(architecture.head, architecture.batch())
    assert (labels == -100).any()
    for row, logits, of_row in zip(result, logits_of_teacher(name), labels, strict=True):
        np.testing.assert_allclose(row["teacher_logits"], logits[of_row != -100], atol=1e-5)


def test_the_top_k_the_target_and_the_mass_of_the_rest_are_those_of_the_logits(tmp_path: Path) -> None:
    result = cached(tmp_path, "llama", top_k=4, temperature=2.0)
    labels = aligned_labels(ARCHITECTURES["llama"].head, ARCHITECTURES["llama"].batch())
    for row, logits, of_row in zip(result, logits_of_teacher("llama"), labels, strict=True):
        rows, targets = logits[of_row != -100], of_row[of_row != -100]
        relative = rows - rows.amax(1, keepdim=True)
        np.testing.assert_array_equal(row["teacher_top_indices"], rows.topk(4).indices)
        np.testing.assert_allclose(row["teacher_top_logits"], relative.topk(4).values, atol=1e-5)
        np.testing.assert_allclose(row["teacher_target_logits"], relative.gather(1, targets[:, None])[:, 0], atol=1e-5)
        others = relative.scatter(1, rows.topk(4).indices, -math.inf).scatter(1, targets[:, None], -math.inf)
        np.testing.assert_allclose(row["teacher_rest"], (others / 2).logsumexp(1), atol=1e-5)
        assert row["teacher_top_indices"].dtype == np.uint16


def test_float16_is_within_its_rounding(tmp_path: Path) -> None:
    exact = logits_of_teacher("bert").numpy()
    result = np.stack(cached(tmp_path, "bert", dtype="float16")["teacher_logits"])
    assert result.dtype == np.float16
    assert (np.abs(result - exact) <= 2**-11 * np.abs(exact) + 1e-6).all()
    assert (result != exact).any()


def test_without_labels_all_tokens_that_are_seen_are_kept(tmp_path: Path) -> None:
    data = rows_of("bert_tokens").remove_columns("labels")
    lengths = [len(logits) for logits in cached(tmp_path, "bert_tokens", data)["teacher_logits"]]
    assert lengths == ARCHITECTURES["bert_tokens"].batch()["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 2


def test_a_stream_is_cached_as_the_data_set_is(tmp_path: Path) -> None:
    whole = cached(tmp_path / "whole", "bert")
    stream = cached(tmp_path / "stream", "bert", rows_of("bert").to_iterable_dataset())
    assert stream.column_names == whole.column_names
    np.testing.assert_array_equal(np.stack(stream["teacher_logits"]), np.stack(whole["teacher_logits"]))
    assert stream["input_ids"] == whole["input_ids"]


def test_a_path_is_loaded_by_the_class_that_it_names(tmp_path: Path) -> None:
    ARCHITECTURES["bert"].model(seed=1).save_pretrained(tmp_path / "teacher")
    result = cache_teacher_outputs(str(tmp_path / "teacher"), rows_of("bert"), tmp_path / "cache", dtype="float32")
    np.testing.assert_allclose(np.stack(result["teacher_logits"]), logits_of_teacher("bert"), atol=1e-6)
    manifest = manifest_of(result)
    assert manifest is not None
    assert manifest.teacher == str(tmp_path / "teacher")
    # The weights tell, not the place.
    assert manifest.fingerprint == teacher_fingerprint(Teacher(ARCHITECTURES["bert"].model(seed=1)))


# --- What travels ---

_JOURNEYS: dict[str, Any] = {
    "shuffle and select": lambda data, path: data.shuffle(seed=3).select([5, 1, 1, 7]),
    "map": lambda data, path: data.map(lambda row: {"length": len(row["input_ids"])}),
    "batched map": lambda data, path: data.map(lambda rows: {"one": [1] * len(rows["labels"])}, batched=True),
    "filter": lambda data, path: data.filter(lambda row: row["labels"] > 0),
    "repeat and concatenate": lambda data, path: datasets.concatenate_datasets([data.repeat(2), data]),
    "disk": lambda data, path: (data.select([3, 2]).save_to_disk(path / "saved"), load_from_disk(path / "saved"))[1],
    "parquet": lambda data, path: (
        data.to_parquet(path / "p.parquet"),
        datasets.load_dataset("parquet", data_files=str(path / "p.parquet"), cache_dir=str(path / "c"))["train"],
    )[1],
    "torch": lambda data, path: data.with_format("torch"),
    "numpy": lambda data, path: data.with_format("numpy"),
    "stream": lambda data, path: data.to_iterable_dataset(num_shards=2).shuffle(seed=0),
}


@pytest.mark.parametrize("journey", _JOURNEYS)
def test_the_manifest_and_the_arrays_travel(journey: str, tmp_path: Path) -> None:
    result = cached(tmp_path / "cache", "bert")
    logits = {tuple(row["input_ids"]): row["teacher_logits"] for row in result}
    went = _JOURNEYS[journey](result, tmp_path)
    assert manifest_of(went) == manifest_of(result)
    rows = list(went)
    assert len(rows) >= 2
    for row in rows:
        np.testing.assert_array_equal(np.asarray(row["teacher_logits"]), logits[tuple(np.asarray(row["input_ids"]))])


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_zeros_at_the_end_stay(form: str | None) -> None:
    feature = ArrayColumn([-1, 3], "float16")
    arrays = [np.zeros((count, 3), np.float16) for count in (0, 2, 4)]
    data = Dataset.from_dict(
        {"x": [feature.encode_example(one) for one in arrays]}, features=datasets.Features({"x": feature})
    )
    assert [row["x"].shape for row in data.with_format(form)] == [(0, 3), (2, 3), (4, 3)]


def test_the_manifest_tells_the_teacher_and_what_it_read(tmp_path: Path) -> None:
    manifest = manifest_of(cached(tmp_path, "bert_tokens"))
    assert manifest is not None
    assert manifest.columns == ["input_ids", "labels"]
    assert (manifest.head, manifest.num_classes, manifest.top_k) == ("token_classification", 5, None)
    assert manifest.class_names == [f"LABEL_{index}" for index in range(5)]
    assert manifest.versions["torch"] == torch.__version__
    assert CachedTeacher(manifest).name == "BertForTokenClassification"


def test_the_fingerprint_is_of_weights_and_config() -> None:
    def of(**changes: Any) -> str:
        return teacher_fingerprint(Teacher(ARCHITECTURES["bert"].model(**{"seed": 1, **changes})))

    assert of() == of()
    changed = ARCHITECTURES["bert"].model(seed=1)
    changed.classifier.bias.data[0] += 1e-3
    different = {of(seed=2), of(layer_norm_eps=1e-5), teacher_fingerprint(Teacher(changed))}
    assert len({of(), *different}) == 4


# --- Going on ---


def test_the_same_call_again_runs_no_teacher_and_changes_no_file(tmp_path: Path) -> None:
    cached(tmp_path, "bert")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert sum(file.suffix == ".arrow" for file in files) == 1
    teacher = ARCHITECTURES["bert"].model(seed=1)
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    cache_teacher_outputs(teacher, rows_of("bert"), tmp_path, batch_size=3, dtype="float32")
    assert len(calls) == 1, "the first batch, which tells the classes"
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize("moment", ["forward 4", "forward 9", "fsync 0", "fsync 2", "fsync 5"])
def test_after_a_kill_no_row_is_missing_or_double(moment: str, tmp_path: Path) -> None:
    whole = killed_cache.make(tmp_path / "whole")
    command = [sys.executable, "-m", "tests.killed_cache", str(tmp_path / "killed"), *moment.split()]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "state.json").exists()
    result = killed_cache.make(tmp_path / "killed")
    assert len(result) == len(whole) == 24
    assert result["input_ids"] == whole["input_ids"]
    np.testing.assert_array_equal(np.stack(result["teacher_logits"]), np.stack(whole["teacher_logits"]))
    assert not list((tmp_path / "killed").glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float32', now 'float16'"),
        ({"teacher": ARCHITECTURES["bert_tokens"].model(seed=2)}, "fingerprint '"),
        ({"top_k": 2}, "top_k None, now 2"),
        ({"dataset": rows_of("bert_tokens").select(range(7))}, "rows 8, now 7"),
        ({"dataset": rows_of("bert_tokens").shuffle(seed=1)}, "for other rows than those of the data set"),
    ],
)
def test_another_cache_in_the_folder_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    cached(tmp_path, "bert_tokens")
    given = {"teacher": ARCHITECTURES["bert_tokens"].model(seed=1), "dataset": rows_of("bert_tokens")}
    given |= {"output_dir": tmp_path, "batch_size": 3, "dtype": "float32", **change}
    with pytest.raises(ValueError, match=message):
        cache_teacher_outputs(**given)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", ["a label", "a column"])
def test_a_change_in_any_row_is_refused(change: str, finished: bool, tmp_path: Path) -> None:
    data = rows_of("bert")
    cached(tmp_path, "bert", data)
    if not finished:
        (tmp_path / "state.json").unlink()
    labels = [*data["labels"][:-1], (data["labels"][-1] + 1) % 5]
    changed = data.remove_columns("labels").add_column("labels", labels) if change == "a label" else None
    changed = data.add_column("index", list(range(8))) if changed is None else changed
    with pytest.raises(ValueError, match="for other rows than those of the data set"):
        cached(tmp_path, "bert", changed)


# --- Refused ---


class Emits(nn.Module):
    """A classifier of one number, which it emits in every row."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(input_ids), 3)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7e4, "float16", r"a logit of size 70000; float16 ends at 65504: cache with dtype=\"float32\""),
        (math.nan, "float32", r"emitted NaN or \+inf"),
        (math.inf, "float16", r"emitted NaN or \+inf"),
    ],
)
def test_logits_that_do_not_fit_are_refused(value: float, dtype: str, message: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": [[1], [2]], "labels": [0, 1]})
    with pytest.raises(ValueError, match=message):
        cache_teacher_outputs(Emits(value), data, tmp_path, dtype=dtype, head="classification")


def test_masked_classes_are_kept_in_float16(tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": [[1], [2]], "labels": [0, 1]})
    result = cache_teacher_outputs(Emits(-math.inf), data, tmp_path, head="classification")
    assert np.stack(result["teacher_logits"]).tolist() == [[-math.inf] * 3] * 2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {"dtype": "int8"}, "dtype is 'int8'"),
        ("bert", {"top_k": 3}, "top_k is 3 for a classification head"),
        ("llama", {"top_k": 0}, "top_k is 0"),
        ("llama", {"top_k": 65}, "top_k is 65 for 64 classes"),
        ("llama", {"top_k": 4, "temperature": 0.0}, "temperature is 0.0"),
        ("bert", {"num_views": 0}, "num_views is 0"),
        ("bert_qa", {}, "places in a batch"),
        ("bert", {"data": rows_of("bert").select([])}, "data set is empty"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, name, **settings)


def test_a_cache_is_not_cached_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a teacher's outputs already"):
        cached(tmp_path / "again", "bert", cached(tmp_path / "cache", "bert"))


def test_what_is_on_disk_is_arrow_and_json(tmp_path: Path) -> None:
    cached(tmp_path, "bert")
    assert sorted(os.listdir(tmp_path)) == [
        "dataset_info.json", "shard-000-000000.arrow", "state.json", "teacher_manifest.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "teacher_manifest.json").read_text())["rows"] == 8
