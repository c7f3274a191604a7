"""Policies of augmentation, in Pillow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dkd import auto_augment


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
