"""A teacher that runs once: its outputs written beside the data."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoConfig, default_data_collator

from . import classes
from .cache_format import manifest_of
from .cache_rows import OutputsOfTeacher
from .cache_shards import Shards, processes
from .heads import Head, head_of
from .targets import PER_EXAMPLE
from .teacher import TEACHER_PREFIX, Teacher

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
    if manifest_of(dataset) is not None:
        raise ValueError("The data set holds a teacher's outputs already: pass the one that it was made from.")
    teacher, state = _as_teacher(teacher), processes()
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
    return Shards(outputs, dataset, folder, collate, batch_size, num_workers).run(class_names, num_views)


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
