"""Data that changes from epoch to epoch: refused, or cached for a number of views with what the teacher saw."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling, default_data_collator

from hf_dkd import DataCollatorForMixup, DKDTrainer
from hf_dkd.cache_format import manifest_of

from .cache_helpers import cached, rows_of, teacher_of, weights_after
from .models import ARCHITECTURES
from .trainer_helpers import arguments


def masking(folder: Path) -> Any:
    """The usual collator of masked language models."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[MASK]", *(f"w{index}" for index in range(2, 64))]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), unk_token="w2", cls_token=None, sep_token=None)
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)


def texts() -> Dataset:
    return rows_of("bert_mlm", seeds=2).remove_columns("labels")


def noisy(rows: dict[str, list]) -> dict[str, list]:
    return {**rows, "pixel_values": [torch.tensor(image) + torch.randn(1) for image in rows["pixel_values"]]}


def brighter(rows: dict[str, list]) -> dict[str, list]:
    return {"pixel_values": [torch.tensor(image) + 1 for image in rows["pixel_values"]], "labels": rows["labels"]}


def test_random_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the first batch has different input_ids: .* num_views="):
        cached(tmp_path / "c", "bert_mlm", texts(), data_collator=masking(tmp_path))


def test_a_random_transform_is_refused_and_a_fixed_one_kept(tmp_path: Path) -> None:
    images = rows_of("vit")
    with pytest.raises(ValueError, match="the first batch has different pixel_values"):
        cached(tmp_path / "noisy", "vit", images.with_transform(noisy))
    # It returns none of the teacher's columns, which stay all the same.
    data = images.with_transform(brighter)
    stored = weights_after(tmp_path, "vit", cached(tmp_path / "brighter", "vit", data), max_steps=3)
    live = weights_after(tmp_path, "vit", data, teacher_of("vit"), max_steps=3, remove_unused_columns=False)
    assert (stored - live).abs().max() <= 1e-6


def test_a_mixing_collator_is_refused(tmp_path: Path) -> None:
    collator = DataCollatorForMixup(default_data_collator, num_classes=5)
    with pytest.raises(ValueError, match="DataCollatorForMixup mixes the examples of a batch"):
        cached(tmp_path / "c", "vit", data_collator=collator)
    student = ARCHITECTURES["vit"].model(problem_type="single_label_classification")
    with pytest.raises(ValueError, match="mixes examples anew for every batch"):
        DKDTrainer(student, arguments(tmp_path), data_collator=collator, train_dataset=cached(tmp_path / "c", "vit"))


@pytest.mark.parametrize("top_k", [None, 64])
def test_views_hold_what_the_teacher_saw(top_k: int | None, tmp_path: Path) -> None:
    settings = {"data_collator": masking(tmp_path), "num_views": 3, "top_k": top_k}
    views = cached(tmp_path / "c", "bert_mlm", texts(), **settings)
    assert len(views) == 3 * 16
    assert views.column_names[:3] == ["input_ids", "attention_mask", "labels"]
    manifest = manifest_of(views)
    assert manifest is not None
    assert manifest.num_views == 3
    masks = {tuple(row["input_ids"]) for row in views}
    assert len(masks) > 40, "each view is masked anew"
    if top_k is None:
        row = views[20]
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = teacher_of("bert_mlm").eval()(**batch).logits[0]
        np.testing.assert_allclose(row["teacher_logits"], logits[torch.tensor(row["labels"]) != -100], atol=1e-5)


def test_training_on_views_is_as_the_live_teacher_on_them(tmp_path: Path) -> None:
    images = rows_of("vit").with_transform(noisy)
    views = cached(tmp_path / "c", "vit", images, num_views=2)
    assert len(views) == 16
    first, second = (np.stack(views["pixel_values"][start : start + 8]) for start in (0, 8))
    assert np.abs(first - second).max() > 0.1
    seen = views.remove_columns(["teacher_logits", "teacher_check"])
    stored = weights_after(tmp_path, "vit", views, max_steps=4)
    live = weights_after(tmp_path, "vit", seen, teacher_of("vit"), max_steps=4)
    assert (stored - live).abs().max() <= 1e-6


def test_views_are_the_same_however_often_they_are_drawn(tmp_path: Path) -> None:
    collator = masking(tmp_path)
    torch.manual_seed(1)
    one = cached(tmp_path / "one", "bert_mlm", texts(), data_collator=collator, num_views=2)
    state = torch.get_rng_state()
    two = cached(tmp_path / "two", "bert_mlm", texts(), data_collator=collator, num_views=2)
    assert one["input_ids"] == two["input_ids"]
    assert torch.equal(torch.get_rng_state(), state), "the script's own random numbers are left alone"


def test_a_random_collator_is_refused_in_training(tmp_path: Path) -> None:
    fixed = rows_of("bert_mlm")
    stored = cached(tmp_path / "c", "bert_mlm", fixed)
    with pytest.raises(ValueError, match="The teacher did not see what the student is given now"):
        weights_after(tmp_path, "bert_mlm", stored, None, masking(tmp_path), max_steps=2)
