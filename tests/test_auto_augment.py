"""Policies of augmentation, in Pillow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dkd import auto_augment

# Table 7 of arXiv 1805.09501: operation, probability and magnitude, twice a sub-policy.
PUBLISHED = [
    ("Invert", 0.1, 7, "Contrast", 0.2, 6),
    ("Rotate", 0.7, 2, "TranslateX", 0.3, 9),
    ("Sharpness", 0.8, 1, "Sharpness", 0.9, 3),
    ("ShearY", 0.5, 8, "TranslateY", 0.7, 9),
    ("AutoContrast", 0.5, 8, "Equalize", 0.9, 2),
    ("ShearY", 0.2, 7, "Posterize", 0.3, 7),
    ("Color", 0.4, 3, "Brightness", 0.6, 7),
    ("Sharpness", 0.3, 9, "Brightness", 0.7, 9),
    ("Equalize", 0.6, 5, "Equalize", 0.5, 1),
    ("Contrast", 0.6, 7, "Sharpness", 0.6, 5),
    ("Color", 0.7, 7, "TranslateX", 0.5, 8),
    ("Equalize", 0.3, 7, "AutoContrast", 0.4, 8),
    ("TranslateY", 0.4, 3, "Sharpness", 0.2, 6),
    ("Brightness", 0.9, 6, "Color", 0.2, 8),
    ("Solarize", 0.5, 2, "Invert", 0.0, 3),
    ("Equalize", 0.2, 0, "AutoContrast", 0.6, 0),
    ("Equalize", 0.2, 8, "Equalize", 0.6, 4),
    ("Color", 0.9, 9, "Equalize", 0.6, 6),
    ("AutoContrast", 0.8, 4, "Solarize", 0.2, 8),
    ("Brightness", 0.1, 3, "Color", 0.7, 0),
    ("Solarize", 0.4, 5, "AutoContrast", 0.9, 3),
    ("TranslateY", 0.9, 9, "TranslateY", 0.7, 9),
    ("AutoContrast", 0.9, 2, "Solarize", 0.8, 3),
    ("Equalize", 0.8, 8, "Invert", 0.1, 3),
    ("TranslateY", 0.7, 9, "AutoContrast", 0.9, 1),
]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_the_policy_for_cifar_has_25_pairs_of_operations_in_range() -> None:
    assert len(auto_augment.SUB_POLICIES) == 25
    for pair in auto_augment.SUB_POLICIES:
        assert len(pair) == 2
        for name, tenths, ninths in pair:
            assert name in auto_augment.OPERATIONS
            assert 0 <= int(tenths) <= 9
            assert 0 <= int(ninths) <= 9


def test_the_policy_for_cifar_is_the_published_one() -> None:
    for number, (ours, published) in enumerate(zip(auto_augment.SUB_POLICIES, PUBLISHED, strict=True)):
        for (name, tenths, ninths), (operation, probability, magnitude) in zip(
            ours, (published[:3], published[3:]), strict=True
        ):
            assert name.replace("_", "") == operation.lower(), number
            assert (int(tenths) / 10, int(ninths)) == (probability, magnitude), (number, operation)


def test_a_pair_is_drawn_at_random_and_each_operation_with_its_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []

    def noted(name: str) -> object:
        return lambda image, strength: seen.append((name, strength)) or image

    monkeypatch.setattr(auto_augment, "OPERATIONS", {name: noted(name) for name in auto_augment.OPERATIONS})
    torch.manual_seed(0)
    draws = 6000
    for _ in range(draws):
        auto_augment.auto_augment(picture())
    wanted = dict.fromkeys(auto_augment.OPERATIONS, 0.0)
    for pair in auto_augment.SUB_POLICIES:
        for name, tenths, _ in pair:
            wanted[name] += int(tenths) / 10 / 25
    for name, share in wanted.items():
        assert sum(one == name for one, _ in seen) / draws == pytest.approx(share, abs=0.03), name
    shears = {round(strength, 6) for name, strength in seen if name == "shear_y"}
    assert shears == {round(sign * ninths / 9, 6) for sign in (-1, 1) for ninths in (7, 8)}


def test_views_are_rgb_of_the_same_size_and_differ() -> None:
    torch.manual_seed(0)
    views = [auto_augment.auto_augment(picture()) for _ in range(50)]
    assert {(view.mode, view.size) for view in views} == {("RGB", (32, 32))}
    assert len({view.tobytes() for view in views}) > 15


def test_torchvision_augments_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        RandAugment=lambda layers, magnitude: lambda view: (view, layers, magnitude),
        AutoAugment=lambda policy: lambda view: (view, policy),
        AutoAugmentPolicy=SimpleNamespace(CIFAR10="cifar10"),
    )
    monkeypatch.setattr(auto_augment, "transforms", stand_in)
    image = picture()
    assert auto_augment.rand_augment(image, 3, 7) == (image, 3, 7)
    assert auto_augment.rand_augment(image, 0, 7) is image
    assert auto_augment.auto_augment(image) == (image, "cifar10")
