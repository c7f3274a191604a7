"""Images for training: random views (shift, mirror, RandAugment; torchvision's if there), and pixels for a model.

They need Pillow (`pip install "hf-dkd[recipes]"`) and are imported by nothing else in the package.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from PIL import ImageEnhance, ImageOps
from PIL.Image import Image, Transform, Transpose
from transformers import TrainerCallback, ViTImageProcessorPil

# By way of the package, 5.17 asks for torchvision: https://github.com/huggingface/transformers/issues/48607
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

logger = get_logger(__name__)

RandAugment: Any = None
if is_torchvision_available():
    RandAugment = importlib.import_module("torchvision.transforms.v2").RandAugment


@dataclass
class AugmentationArguments:
    """How training images vary; evaluation sees them as they are. Made for `HfArgumentParser`.

    Raises:
        ValueError: for a number outside its range.
    """

    random_crop_padding: float = field(
        default=0.125, metadata={"help": "Random crop of an image with a black border of this share of a side."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror every other image."})
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
        for name, most in (ranges | {"mixup_alpha": 100, "cutmix_alpha": 100}).items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to {most}.")


def warp(image: Image, *matrix: float) -> Image:
    return image.transform(image.size, Transform.AFFINE, matrix)


# Those of torchvision's RandAugment, in Pillow, each at a strength from -1 to 1.
OPERATIONS: tuple[Callable[[Image, float], Image], ...] = (
    lambda image, strength: image,
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    lambda image, strength: ImageOps.solarize(image, round(255 * (1 - abs(strength)))),
    lambda image, strength: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength),
    lambda image, strength: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    lambda image, strength: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    lambda image, strength: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
    lambda image, strength: image.rotate(30 * strength),
    lambda image, strength: warp(image, 1, 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength: warp(image, 1, 0, 0, 0.3 * strength, 1, 0),
    lambda image, strength: warp(image, 1, 0, 0.45 * strength * image.width, 0, 1, 0),
    lambda image, strength: warp(image, 1, 0, 0, 0, 1, 0.45 * strength * image.height),
)


def rand_augment(image: Image, layers: int, magnitude: int) -> Image:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719) of an RGB image, drawn from PyTorch's generator.

    Args:
        image: RGB.
        layers: random operations, one after the other.
        magnitude: their strength, 0 to 30.
    """
    if layers and RandAugment is not None:
        return RandAugment(layers, magnitude)(image)
    for number in torch.randint(len(OPERATIONS), (layers,)).tolist():
        sign = 1 if torch.rand(()) < 0.5 else -1
        image = OPERATIONS[number](image, sign * magnitude / 30)
    return image


def augment(image: Image, options: AugmentationArguments) -> Image:
    """A random view of an RGB image, in its size, drawn from PyTorch's generator."""
    border = [round(options.random_crop_padding * side) for side in image.size]
    left, top = (int(torch.randint(-pixels, pixels + 1, ())) for pixels in border)
    view = image.crop((left, top, left + image.width, top + image.height))
    if options.horizontal_flip and torch.rand(()) < 0.5:
        view = view.transpose(Transpose.FLIP_LEFT_RIGHT)
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
