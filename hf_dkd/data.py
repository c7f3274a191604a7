"""Collators: the teacher's inputs beside the student's in one batch, and images mixed with each other."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .teacher import TEACHER_PREFIX

_LABELS = frozenset({"label", "labels", "label_ids"})


@dataclass
class DataCollatorWithTeacherInputs:
    """Both models' inputs in one batch, the teacher's under `teacher_` names.

    For a teacher with another image size, another normalisation or another tokenizer. Where the examples hold columns
    with the `teacher_` prefix, the teacher's collator gets those, without the prefix, and the student's collator the
    others. Where they hold none, both get the whole examples (an image, say, which each processes in its own way).

    Args:
        collator: makes the student's batch, labels included.
        teacher_collator: makes the teacher's; labels in what it returns are dropped.

    Example:
        >>> student, teacher = DataCollatorWithPadding(tokenizer), DataCollatorWithPadding(teacher_tokenizer)
        >>> data_collator = DataCollatorWithTeacherInputs(student, teacher)
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    teacher_collator: Callable[[list[Any]], Mapping[str, Any]]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate a list of examples into one dictionary of both models' inputs.

        Raises:
            ValueError: where only some of the examples have columns for the teacher.
        """
        own = [_without_prefix(example) for example in examples]
        separate = all(own)
        if any(own) and not separate:
            lacking = own.index({})
            raise ValueError(
                f"Example {lacking} of the batch has no column that starts with {TEACHER_PREFIX!r}, but others have: "
                f"its columns are {', '.join(examples[lacking])}. Bring the teacher's columns in all examples or none."
            )
        students = [_without_teacher(example) for example in examples]
        batch = dict(self.collator(students))
        for name, value in self.teacher_collator(own if separate else [dict(example) for example in examples]).items():
            if name not in _LABELS:
                batch[TEACHER_PREFIX + name] = value
        return batch


@dataclass
class DataCollatorForMixup:
    """Mixes the images of a training batch two by two, by mixup or by CutMix; batches for evaluation stay as they are.

    `DKDTrainer` takes `for_training` for its training batches and calls the collator itself for all others. Teacher and
    student see the same mixture, each in its own size. The labels become shares of the classes, which
    `config.problem_type = "single_label_classification"` tells from several labels per example.

    What is drawn depends on `seed` and the images of the batch alone, so that it changes neither with the number of
    workers nor after resuming. (Fixed images in a fixed order are mixed alike in every epoch: shuffle them.)

    Stock `Trainer` calls the collator itself for training too, and so does not mix: give it `collator.for_training`.

    Args:
        collator: makes batches of `pixel_values` (B, channels, height, width) and integer `labels` (B,), and maybe
            `teacher_pixel_values`.
        num_classes: C, the width of the labels.
        mixup_alpha: shares are drawn from Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412); 0 switches it off.
        cutmix_alpha: the same for CutMix (Yun et al. 2019, arXiv 1905.04899). With both, each batch takes one of them.
        seed: of what is drawn.

    Example:
        >>> student.config.problem_type = "single_label_classification"
        >>> data_collator = DataCollatorForMixup(collator, num_classes=100, mixup_alpha=0.8, cutmix_alpha=1.0)
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    num_classes: int
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number of 0 or above.")
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0: nothing would be mixed; leave the collator out.")

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """The batch as the inner collator makes it."""
        return dict(self.collator(examples))

    def for_training(self, examples: list[Any]) -> dict[str, Any]:
        """The batch with its images mixed, and labels (B, C).

        Raises:
            ValueError: for labels that are not integers in [0, C).
        """
        batch = self(examples)
        labels, pixels = batch["labels"], batch["pixel_values"]
        if labels.is_floating_point() or labels.ndim != 1 or not ((labels >= 0) & (labels < self.num_classes)).all():
            raise ValueError(
                f"The labels are {labels.dtype} of shape {tuple(labels.shape)}, {labels.flatten()[:5].tolist()}, …; "
                f"mixing takes one class in [0, {self.num_classes}) for each image."
            )
        # Some thousand pixels of each image are enough: all of a batch of large ones would take longer than mixing it.
        seen = pixels.flatten(1)[:, :: max(1, pixels[0].numel() // 4096)].float().contiguous().numpy().tobytes()
        random = np.random.default_rng([self.seed, zlib.crc32(seen)])
        others = torch.from_numpy(random.permutation(len(labels)))
        cuts = random.random() < 0.5 if self.mixup_alpha and self.cutmix_alpha else bool(self.cutmix_alpha)
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        drawn = share = float(random.beta(alpha, alpha))
        center = random.random(2)
        for name in (f"{TEACHER_PREFIX}pixel_values", "pixel_values"):
            if name in batch and cuts:
                batch[name], share = _pasted(batch[name], others, center, drawn)
            elif name in batch:
                batch[name] = drawn * batch[name] + (1 - drawn) * batch[name][others]
        classes = one_hot(labels.long(), self.num_classes).float()
        batch["labels"] = share * classes + (1 - share) * classes[others]
        return batch


def _pasted(pixels: Tensor, others: Tensor, center: np.ndarray, share: float) -> tuple[Tensor, float]:
    """`pixels` with a box from the images `others`, which leaves about `share` of each, and the share that is left."""
    sides = np.array(pixels.shape[-2:])
    half = np.sqrt(1 - share) / 2
    top, left = np.rint(np.clip(center - half, 0, 1) * sides).astype(int)
    bottom, right = np.rint(np.clip(center + half, 0, 1) * sides).astype(int)
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels[others][..., top:bottom, left:right]
    return mixed, float(1 - (bottom - top) * (right - left) / sides.prod())


def _without_prefix(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(TEACHER_PREFIX): v for name, v in example.items() if name.startswith(TEACHER_PREFIX)}


def _without_teacher(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in example.items() if not name.startswith(TEACHER_PREFIX)}
