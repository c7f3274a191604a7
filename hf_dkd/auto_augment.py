"""AutoAugment and RandAugment of images: torchvision's where it is installed, or else the same in Pillow.

They need Pillow (`pip install "hf-dkd[recipes]"`).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from PIL import ImageEnhance, ImageOps
from PIL.Image import Image, Transform
from transformers.utils import is_torchvision_available

transforms: Any = importlib.import_module("torchvision.transforms.v2") if is_torchvision_available() else None


def warp(image: Image, *matrix: float) -> Image:
    return image.transform(image.size, Transform.AFFINE, matrix)


# Each at a strength from -1 to 1.
OPERATIONS: dict[str, Callable[[Image, float], Image]] = {
    "identity": lambda image, strength: image,
    "auto_contrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
    "posterize": lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    "solarize": lambda image, strength: ImageOps.solarize(image, round(255 * (1 - abs(strength)))),
    "brightness": lambda image, strength: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength),
    "color": lambda image, strength: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    "contrast": lambda image, strength: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    "sharpness": lambda image, strength: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
    "rotate": lambda image, strength: image.rotate(30 * strength),
    "shear_x": lambda image, strength: warp(image, 1, 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength: warp(image, 1, 0, 0, 0.3 * strength, 1, 0),
    "translate_x": lambda image, strength: warp(image, 1, 0, 0.45 * strength * image.width, 0, 1, 0),
    "translate_y": lambda image, strength: warp(image, 1, 0, 0, 0, 1, 0.45 * strength * image.height),
}
IN_RAND_AUGMENT = tuple(OPERATIONS.values())
OPERATIONS["invert"] = lambda image, strength: ImageOps.invert(image)

# The policy for CIFAR-10, which CIFAR-100 shares (Cubuk et al., table 7): of each pair of operations the first and the
# second, with its probability in tenths and its strength in ninths.
CIFAR_POLICY = """
    invert 1 7, contrast 2 6; rotate 7 2, translate_x 3 9; sharpness 8 1, sharpness 9 3;
    shear_y 5 8, translate_y 7 9; auto_contrast 5 8, equalize 9 2; shear_y 2 7, posterize 3 7;
    color 4 3, brightness 6 7; sharpness 3 9, brightness 7 9; equalize 6 5, equalize 5 1;
    contrast 6 7, sharpness 6 5; color 7 7, translate_x 5 8; equalize 3 7, auto_contrast 4 8;
    translate_y 4 3, sharpness 2 6; brightness 9 6, color 2 8; solarize 5 2, invert 0 3;
    equalize 2 0, auto_contrast 6 0; equalize 2 8, equalize 6 4; color 9 9, equalize 6 6;
    auto_contrast 8 4, solarize 2 8; brightness 1 3, color 7 0; solarize 4 5, auto_contrast 9 3;
    translate_y 9 9, translate_y 7 9; auto_contrast 9 2, solarize 8 3; equalize 8 8, invert 1 3;
    translate_y 7 9, auto_contrast 9 1
"""
SUB_POLICIES = [[step.split() for step in pair.split(",")] for pair in CIFAR_POLICY.split(";")]


def auto_augment(image: Image) -> Image:
    """AutoAugment's policy for CIFAR (Cubuk et al. 2019, arXiv 1805.09501) of an RGB image, drawn from PyTorch's
    generator.
    """
    if transforms is not None:
        return transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)(image)
    for name, tenths, ninths in SUB_POLICIES[int(torch.randint(len(SUB_POLICIES), ()))]:
        if torch.rand(()) < int(tenths) / 10:
            sign = 1 if torch.rand(()) < 0.5 else -1
            image = OPERATIONS[name](image, sign * int(ninths) / 9)
    return image


def rand_augment(image: Image, layers: int, magnitude: int) -> Image:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719) of an RGB image, drawn from PyTorch's generator.

    Args:
        image: RGB.
        layers: random operations, one after the other.
        magnitude: their strength, 0 to 30.
    """
    if layers and transforms is not None:
        return transforms.RandAugment(layers, magnitude)(image)
    for number in torch.randint(len(IN_RAND_AUGMENT), (layers,)).tolist():
        sign = 1 if torch.rand(()) < 0.5 else -1
        image = IN_RAND_AUGMENT[number](image, sign * magnitude / 30)
    return image
