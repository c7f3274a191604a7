"""Tiny data sets and caches for the tests of teachers that run once."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertTokenizerFast, DataCollatorForSeq2Seq

from hf_dkd import DKDTrainer, cache_teacher_outputs

from .models import ARCHITECTURES
from .trainer_helpers import arguments, weights_of


def rows_of(name: str, seeds: int = 1) -> Dataset:
    """The 8 examples that fit an architecture for each seed, as a data set."""
    batches = [ARCHITECTURES[name].batch(seed) for seed in range(seeds)]
    return Dataset.from_dict({key: torch.cat([batch[key] for batch in batches]).tolist() for key in batches[0]})


def ragged(name: str = "llama", seeds: int = 1) -> Dataset:
    """Its examples without padding, for `padding_collator`."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        length = sum(row["attention_mask"])
        return {key: row[key][:length] for key in ("input_ids", "labels")}

    return rows_of(name, seeds).map(cut, remove_columns="attention_mask")


def padding_collator(folder: Path, side: str = "right", multiple: int | None = None) -> Any:
    """Pads ids, masks and labels to the longest example of a batch."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", *(f"w{index}" for index in range(1, 64))]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), pad_token="[PAD]", padding_side=side)
    return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)


def teacher_of(name: str) -> Any:
    """The teacher whose outputs `cached` writes."""
    return ARCHITECTURES[name].model(seed=1)


def cached(path: Path, name: str, data: Any = None, **settings: Any) -> Dataset:
    """The outputs of the architecture's teacher, in float32 unless `settings` say otherwise."""
    data = rows_of(name) if data is None else data
    settings = {"batch_size": 3, "dtype": "float32", **settings}
    return cache_teacher_outputs(teacher_of(name), data, path, **settings)


def weights_after(
    path: Path, name: str, data: Any, teacher: Any = None, collator: Any = None, student: Any = None, **settings: Any
) -> Tensor:
    """The student's weights after training on `data`, with a live teacher or, without one, what is cached.

    The learning rate is small enough for rounding not to grow from step to step.
    """
    student = ARCHITECTURES[name].model(seed=0) if student is None else student
    trainer = DKDTrainer(
        student,
        arguments(path, **{"max_steps": 50, "train_sampling_strategy": "random", "learning_rate": 0.01, **settings}),
        data_collator=collator,
        train_dataset=data,
        teacher=teacher,
    )
    trainer.train()
    return weights_of(student)


def logits_of_teacher(name: str, batch: dict[str, Tensor] | None = None) -> Tensor:
    """The teacher's logits of the 8 examples."""
    with torch.no_grad():
        return teacher_of(name).eval()(**(ARCHITECTURES[name].batch() if batch is None else batch)).logits
