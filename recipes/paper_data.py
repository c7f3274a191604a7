"""The images of `paper_cifar100.py`: those of CIFAR-100 stay on the device, those of ImageNet are read when needed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import fail, option
from datasets import DatasetDict
from paper_presets import CIFAR, PAIRS, PaperTrainingArguments
from PIL import ImageOps
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil
from vit_cifar100 import ImageDataArguments, load_images

from hf_dkd.device_images import DeviceImages, as_it_is, pixels_of
from hf_dkd.images import AugmentationArguments, AugmentedImages, ImageCollator

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_COLOURS: dict[str, Any] = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


@dataclass
class PaperArguments(ImageDataArguments):
    validation_share: float | None = option(None, "Held out, to be watched instead of the test set, as for tuning.")
    image_size: int = option(32, "Pixels a side, of CIFAR-100.")
    label_noise: float = option(0.0, "Share of the training images that get the label of another class.")
    auto_augment: bool = option(False, "AutoAugment besides, for CIFAR-100; --dataloader_num_workers make it faster.")
    student_model_name_or_path: str | None = option(None, "Start from this checkpoint instead of random weights.")
    minutes: float | None = option(None, "Write a checkpoint and stop after this time.")

    def __post_init__(self) -> None:
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}; expected a time above 0.")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is {self.label_noise}; expected a share from 0 to 1.")


# What a teacher learns from.
_OF_TEACHERS = ("dataset_name", "dataset_config_name", "train_file", "max_train_samples", "validation_share")


def teacher_folder(name: str, data: PaperArguments) -> str:
    """Where a teacher is if nothing else is said: one for each kind of images, as it learns from the student's."""
    size = f"-{data.image_size}px" if data.image_size != 32 else ""
    noise = f"-noise{data.label_noise:g}" if data.label_noise else ""
    return f"outputs/teachers/{name}{size}{noise}{'-auto_augment' if data.auto_augment else ''}"


def teacher_settings(name: str, data: PaperArguments, args: PaperTrainingArguments) -> dict[str, Any]:
    """What makes a teacher that is trained here another one; the seed does not."""
    own = {"teacher": name, "teacher_epochs": args.teacher_epochs or args.num_train_epochs}
    of_images = {option: getattr(data, option) for option in ("image_size", "label_noise", "auto_augment")}
    return own | of_images | {option: getattr(data, option) for option in _OF_TEACHERS}


def claim(folder: str, settings: dict[str, Any]) -> None:
    """Keep a folder for one training, which goes on there: another one would take its checkpoints for its own."""
    file, settings = Path(folder, "training.json"), json.loads(json.dumps(settings, default=str))
    begun = any(file.parent.glob("**/trainer_state.json"))
    if begun and file.exists() and (there := json.loads(file.read_text())) != settings:
        changed = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
        told = ", ".join(f"{name} {there.get(name)} and not {settings.get(name)}" for name in sorted(changed))
        fail(f"{folder} holds a training with {told}: choose another folder, or remove it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(settings, indent=2))
    written.replace(file)  # other processes read it


class Images(NamedTuple):
    """Splits, the collator that makes batches of them, the processor for other images, and the names of the classes."""

    splits: dict[str, Any]
    collator: Any
    processor: Any
    names: list[str]


def load(data: PaperArguments, args: PaperTrainingArguments) -> Images:
    rows, names = load_images(data)
    if len(rows) == 1:
        fail("no split to watch: give data with a test split, or hold out a validation split, --validation_share 0.1.")
    if data.label_noise:
        wrong = noisy(torch.tensor(rows["train"]["labels"]), len(names), data.label_noise, data.split_seed)
        feature = rows["train"].features["labels"]
        rows["train"] = rows["train"].remove_columns("labels").add_column("labels", wrong.tolist(), feature=feature)
    if PAIRS[args.pair].schedule is not CIFAR:
        return imagenet_images(rows, names, args)
    if data.auto_augment:
        return strongly_augmented(rows, names, data, args)
    args.dataloader_num_workers, args.dataloader_pin_memory = 0, False  # for images that are on the device
    return cifar_images(rows, names, data, args)


def cifar_processor(size: int) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=CIFAR_MEAN, image_std=CIFAR_STD)


def cifar_images(rows: DatasetDict, names: list[str], data: PaperArguments, args: PaperTrainingArguments) -> Images:
    """In training out of a black border of an eighth, and mirrored every other time."""
    size, splits = data.image_size, {}
    for name, split in rows.items():
        views: dict[str, Any] = {"padding": size // 8, "mirror": True, "seed": args.seed} if name == "train" else {}
        labels = torch.tensor(split["labels"])
        splits[name] = DeviceImages(
            pixels_of(split, size), labels, mean=CIFAR_MEAN, std=CIFAR_STD, device=args.device, **views
        )
    return Images(splits, as_it_is, cifar_processor(size), names)


def strongly_augmented(
    rows: DatasetDict, names: list[str], data: PaperArguments, args: PaperTrainingArguments
) -> Images:
    """The same with AutoAugment, which is made by the processor, by `dataloader_num_workers`."""
    views = AugmentationArguments(auto_augment=True, rand_augment_layers=0)
    splits = {**rows, "train": AugmentedImages(rows["train"], views, args.seed)}
    processor = cifar_processor(data.image_size)
    return Images(splits, ImageCollator(processor), processor, names)


def noisy(labels: torch.Tensor, classes: int, share: float, seed: int) -> torch.Tensor:
    """Symmetric noise: about this share of the labels (N,) becomes another class, all of them as likely."""
    source = torch.Generator().manual_seed(seed)
    others = (labels + torch.randint(1, classes, labels.shape, generator=source)) % classes
    return torch.where(torch.rand(labels.shape, generator=source) < share, others, labels)


def imagenet_images(rows: DatasetDict, names: list[str], args: PaperTrainingArguments) -> Images:
    """In training 224 × 224 pixels of a random part of the image, otherwise of its middle (224 out of 256)."""

    def middle(batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"image": [ImageOps.fit(image, (224, 224), bleed=1 / 16) for image in batch["image"]]}

    views = AugmentationArguments(random_crop_padding=0, random_resized_crop=224, rand_augment_layers=0)
    splits: dict[str, Any] = {name: split.with_transform(middle) for name, split in rows.items()}
    splits["train"] = AugmentedImages(rows["train"], views, args.seed)
    collator = ImageCollator(ViTImageProcessorPil(size={"height": 224, "width": 224}, **IMAGENET_COLOURS))
    return Images(splits, collator, ConvNextImageProcessorPil(size={"shortest_edge": 224}, **IMAGENET_COLOURS), names)
