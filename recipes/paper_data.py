"""The images of `paper_cifar100.py`: those of CIFAR-100 stay on the device, those of ImageNet are read when needed."""

from functools import partial
from typing import Any, NamedTuple

import torch
from common import fail
from datasets import DatasetDict
from paper_options import PaperArguments, PaperTrainingArguments
from paper_presets import CIFAR, PAIRS
from PIL import ImageOps
from PIL.Image import Resampling
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil
from vit_cifar100 import load_images

from hf_dkd.device_images import DeviceImages, as_it_is, pixels_of
from hf_dkd.images import AugmentationArguments, AugmentedImages, ImageCollator

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_COLOURS: dict[str, Any] = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


class Images(NamedTuple):
    """Splits, the collator that makes batches of them, the processor for other images, and the names of the classes."""

    splits: dict[str, Any]
    collator: Any
    processor: Any
    names: list[str]


def load(data: PaperArguments, args: PaperTrainingArguments) -> Images:
    """The images that the options name, those for training with their noise and their views.

    For images that are on the device it sets the options of the loader in `args`.

    Raises:
        SystemExit: with one line, for data that cannot be loaded or that has no split to watch.
    """
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
    args.dataloader_prefetch_factor, args.dataloader_persistent_workers = None, False
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
    """In training 224 × 224 pixels of a random part of the image, otherwise of its middle (of 256), bilinear."""

    def middle(batch: dict[str, Any]) -> dict[str, Any]:
        fit = partial(ImageOps.fit, size=(224, 224), method=Resampling.BILINEAR, bleed=1 / 16)
        return batch | {"image": [fit(image) for image in batch["image"]]}

    views = AugmentationArguments(random_crop_padding=0, random_resized_crop=224, rand_augment_layers=0)
    splits: dict[str, Any] = {name: split.with_transform(middle) for name, split in rows.items()}
    splits["train"] = AugmentedImages(rows["train"], views, args.seed)
    collator = ImageCollator(ViTImageProcessorPil(size={"height": 224, "width": 224}, **IMAGENET_COLOURS))
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 224}, resample=Resampling.BILINEAR, **IMAGENET_COLOURS)
    return Images(splits, collator, processor, names)
