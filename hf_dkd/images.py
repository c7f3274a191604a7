"""Images for training: random views, and pixels for a model.

They need Pillow (`pip install "hf-dkd[recipes]"`) and are imported by nothing else in the package.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from PIL.Image import Image, Resampling, Transpose
from transformers import TrainerCallback, ViTImageProcessorPil

# By way of the package, 5.17 asks for torchvision: https://github.com/huggingface/transformers/issues/48607
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .auto_augment import auto_augment, rand_augment

logger = get_logger(__name__)


@dataclass
class AugmentationArguments:
    """How training images vary; evaluation sees them as they are. Made for `HfArgumentParser`.

    Raises:
        ValueError: for a number outside its range.
    """

    random_crop_padding: float = field(
        default=0.125, metadata={"help": "Random crop of an image with a black border of this share of a side."}
    )
    random_resized_crop: int = field(
        default=0,
        metadata={
            "help": "Train on a random part of the image, 8 to 100 % of its area, at this many pixels a side, as is "
            "usual for ImageNet; 0 switches it off."
        },
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror every other image."})
    auto_augment: bool = field(
        default=False, metadata={"help": "The policy that AutoAugment found for CIFAR, before RandAugment."}
    )
    rand_augment_layers: int = field(
        default=2, metadata={"help": "Operations of RandAugment on each image; 0 switches it off."}
    )
    rand_augment_magnitude: int = field(default=9, metadata={"help": "Their strength, 0 to 30."})
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mix images two by two, with shares from Beta(alpha, alpha); 0 switches it off."}
    )
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "The same for CutMix. With both, each batch takes one of them."}
    )

    def __post_init__(self) -> None:
        ranges = {"random_crop_padding": 1, "rand_augment_layers": 14, "rand_augment_magnitude": 30}
        ranges |= {"mixup_alpha": 100, "cutmix_alpha": 100, "random_resized_crop": 10_000}
        for name, most in ranges.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to {most}.")


def random_resized_crop(image: Image, size: int) -> Image:
    """A random part of an image, (size, size), drawn from PyTorch's generator (Szegedy et al. 2015, arXiv 1409.4842).

    It has 8 to 100 % of the area and sides that are as 3 to 4 at most.
    """
    for _ in range(10):
        area = image.width * image.height * float(torch.empty(()).uniform_(0.08, 1))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(torch.randint(image.width - width + 1, ()))
            top = int(torch.randint(image.height - height + 1, ()))
            break
    else:  # an image too long for such parts: the longest one in its middle, as in torchvision
        width, height = min(image.width, round(image.height * 4 / 3)), min(image.height, round(image.width * 4 / 3))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + width, top + height))


def augment(image: Image, options: AugmentationArguments) -> Image:
    """A random view of an RGB image, in its size but for `random_resized_crop`, drawn from PyTorch's generator."""
    if options.random_resized_crop:
        image = random_resized_crop(image, options.random_resized_crop)
    border = [round(options.random_crop_padding * side) for side in image.size]
    left, top = (int(torch.randint(-pixels, pixels + 1, ())) for pixels in border)
    view = image.crop((left, top, left + image.width, top + image.height))
    if options.horizontal_flip and torch.rand(()) < 0.5:
        view = view.transpose(Transpose.FLIP_LEFT_RIGHT)
    if options.auto_augment:
        view = auto_augment(view)
    return rand_augment(view, options.rand_augment_layers, options.rand_augment_magnitude)


class AugmentedImages(torch.utils.data.Dataset):
    """`rows` with each image seen through a view that seed, epoch and index determine.

    Drawn from the running generators instead, views would change with the number of workers, and after resuming:
    Accelerate fetches one batch ahead of the step that a checkpoint is of.

    Args:
        rows: has a column of images, `image`.
        options: how the views vary.
        seed: two runs with the same seed see the same views.
    """

    def __init__(self, rows: Dataset, options: AugmentationArguments, seed: int) -> None:
        self.rows, self.options, self.seed = rows, options, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # persistent workers see it change

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, int(self.epoch), index)))
            return {**row, "image": augment(row["image"], self.options)}


class CountEpochs(TrainerCallback):
    """Tells `AugmentedImages` which epoch it is: Accelerate's `set_epoch` may stop at the sampler."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].dataset.epoch.fill_(int(state.epoch or 0))


def load_processor(path: str | None, config: Any, revision: str | None = None, **options: Any) -> Any:
    """The image processor saved at `path`; where there is none, or options are given, one that resizes to a square.

    Args:
        path: folder or Hub id; None for a model without a checkpoint.
        config: of the model, whose `image_size` is taken where nothing else tells it, and 224 where it has none.
        revision: of the Hub's files.
        options: `image_size`, `image_mean`, `image_std` and others of the processor; None counts as not given.
    """
    options = {name: value for name, value in options.items() if value is not None}
    saved = None
    if path is not None:
        try:
            saved = AutoImageProcessor.from_pretrained(path, revision=revision)
        except OSError:
            logger.warning(f"{path} has no image processor: the size is taken from its config, and 0.5 as mean and std")
    if saved is not None and not options:
        return saved
    size = options.pop("image_size", getattr(config, "image_size", 224))
    kept = {name: getattr(saved, name) for name in ("image_mean", "image_std", "resample") if hasattr(saved, name)}
    return ViTImageProcessorPil(size={"height": size, "width": size}, **kept | options)


@dataclass
class ImageCollator:
    """Batches of `pixel_values` and `labels` (B,) from rows of an `image` and an integer `labels`.

    Args:
        processor: an image processor of transformers, such as `load_processor` returns.
    """

    processor: Any

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pixels = self.processor([row["image"] for row in rows], return_tensors="pt")
        return {**pixels, "labels": torch.tensor([row["labels"] for row in rows])}
