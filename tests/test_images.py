from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_dkd import images

from .recipes.image_assets import digits


def test_views_depend_on_seed_epoch_and_index_alone() -> None:
    rows = [{"image": image.convert("RGB"), "labels": label} for image, label in zip(*digits("test"), strict=True)][:12]

    def views(data: Any) -> list[bytes]:
        return [data[index]["image"].tobytes() for index in range(len(data))]

    data = images.AugmentedImages(rows, images.AugmentationArguments(), seed=3)
    state = torch.get_rng_state()
    first = views(data)
    assert torch.equal(torch.get_rng_state(), state), "dropout would change with the augmentation"
    assert views(data) == first
    assert [row["labels"] for row in data] == [row["labels"] for row in rows]

    workers = DataLoader(data, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=list)
    assert [row["image"].tobytes() for batch in workers for row in batch] == first
    data.epoch.fill_(1)
    second = [row["image"].tobytes() for batch in workers for row in batch]
    assert second == views(data)
    assert sum(a != b for a, b in zip(first, second, strict=True)) >= 10
    other = images.AugmentedImages(rows, images.AugmentationArguments(), seed=4)
    assert sum(a != b for a, b in zip(first, views(other), strict=True)) >= 10


def test_each_part_of_the_augmentation_can_be_switched_off() -> None:
    image = digits("test")[0][0].convert("RGB")
    pixels = np.asarray(image)
    off = {"random_crop_padding": 0.0, "horizontal_flip": False, "rand_augment_layers": 0}

    def seen(**options: Any) -> list[np.ndarray]:
        arguments = images.AugmentationArguments(**off | options)
        return [np.asarray(images.augment(image, arguments)) for _ in range(60)]

    assert all(np.array_equal(view, pixels) for view in seen())
    flipped = [np.array_equal(view, pixels[:, ::-1]) for view in seen(horizontal_flip=True)]
    assert 15 < sum(flipped) < 45
    bordered = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    windows = {bordered[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    assert {view.tobytes() for view in seen(random_crop_padding=0.125)} == windows
    assert len({view.tobytes() for view in seen(rand_augment_layers=2)}) > 20
    weak, strong = (
        np.mean([np.abs(view.astype(float) - pixels) for view in seen(rand_augment_layers=1, rand_augment_magnitude=m)])
        for m in (3, 30)
    )
    assert strong > 1.5 * weak


def test_a_random_part_of_an_image_is_resized() -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8), (120, 1))
    image = Image.fromarray(np.stack([ramp, ramp, ramp], axis=-1))
    torch.manual_seed(0)
    views = [np.asarray(images.random_resized_crop(image, 32)).astype(float) for _ in range(200)]
    assert {view.shape for view in views} == {(32, 32, 3)}
    widths = np.array([(view[0, -1, 0] - view[0, 0, 0]) * 32 / 31 for view in views])
    # An area of 8 to 100 %, with sides as 3 to 4 at most: widths of 38 to 179 pixels of 200, where the height fits.
    assert widths.min() < 60
    assert 120 < widths.max() < 180
    # Of these no such part is found: the middle it is, 13 by 10 and 10 by 13 pixels.
    colours = np.arange(255, dtype=np.uint8) * np.ones((10, 1), dtype=np.uint8)
    for turned in (False, True):
        long = Image.fromarray(np.stack([colours.T if turned else colours] * 3, axis=-1))
        view = np.asarray(images.random_resized_crop(long, 130))[..., 0].astype(float)
        assert view.shape == (130, 130)
        assert (view.min(), view.max()) == (121, 133)
    options = images.AugmentationArguments(random_crop_padding=0, rand_augment_layers=0, random_resized_crop=24)
    assert images.augment(image, options).size == (24, 24)
