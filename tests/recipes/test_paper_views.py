"""Which views of its images the paper's benchmark trains on: new ones in every epoch, and ImageNet's as published."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from scipy.stats import ks_2samp, kstest
from torch import Tensor

from .launching import built

LABELS_ALONE = {"dkd_alpha": 0.0, "dkd_beta": 0.0}

# ---- From epoch to epoch ----


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for 24 images to train on, each of a class of its own, by which a view is told."""
    folder, options = tmp_path_factory.mktemp("images"), {}
    features = Features(img=ImageFeature(), fine_label=ClassLabel(names=[str(number) for number in range(24)]))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    for split, count in (("train", 24), ("test", 4)):
        rows = {"img": [Image.fromarray(image) for image in pixels[:count]], "fine_label": list(range(count))}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
        options[f"{split}_file"] = str(folder / f"{split}.parquet")
    return options | LABELS_ALONE | {"pair": "resnet20-resnet8", "image_size": 16, "per_device_train_batch_size": 8}


def views(epochs: int, **options: Any) -> list[list[Tensor]]:
    """What a training sees of each image, by epoch."""
    trainer, _ = built("paper_cifar100", num_train_epochs=epochs, save_strategy="no", **options)
    collate, batches = trainer.data_collator, []

    def noted(rows: Any) -> Any:
        batches.append(collate(rows))
        return batches[-1].copy()

    trainer.data_collator, trainer.args.eval_strategy = noted, "no"
    trainer.train()
    labels, pixels = (torch.cat([batch[name] for batch in batches]) for name in ("labels", "pixel_values"))
    of_epochs = []
    for order, seen in zip(labels.view(epochs, -1), pixels.view(epochs, -1, *pixels.shape[1:]), strict=True):
        assert sorted(order.tolist()) == list(range(24))
        of_epochs.append(list(seen[order.argsort()]))
    return of_epochs


def new(first: list[Tensor], second: list[Tensor]) -> int:
    """How many images are seen differently."""
    return sum(not torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("auto_augment", [False, True])
def test_every_epoch_has_new_views_which_the_seed_repeats(
    auto_augment: bool, images: dict[str, Any], tmp_path: Path
) -> None:
    options = images | {"auto_augment": auto_augment, "output_dir": tmp_path}
    first = views(3, **options, seed=5)
    changes = [new(first[before], first[after]) for before, after in ((0, 1), (0, 2), (1, 2))]
    assert min(changes) > 18  # one of 50 is the same by chance
    assert [new(*pair) for pair in zip(first, views(3, **options, seed=5), strict=True)] == [0, 0, 0]
    of_another_seed = new(first[0], views(1, **options, seed=6)[0])
    assert of_another_seed > 18


# ---- ImageNet ----

WIDTH, HEIGHT = 240, 180


def boxes(pixels: np.ndarray) -> np.ndarray:
    """Left, top, width, height and whether it is mirrored, (N, 5), of views (N, 2, 224, 224) of x and y."""
    across, down = pixels[:, 0].mean(1), pixels[:, 1].mean(2)
    middle, found = np.arange(32, 192), []  # at the rim, a pixel that is enlarged has no neighbour to mix with
    for x, y in zip(across, down, strict=True):
        (rate, left), (rate_down, top) = (np.polyfit(middle + 0.5, line[middle] + 0.5, 1) for line in (x, y))
        found.append([min(left, left + 224 * rate), top, 224 * abs(rate), 224 * rate_down, rate < 0])
    return np.array(found)


def published(draws: int) -> np.ndarray:
    """The areas (of the whole) and ratios of torchvision's RandomResizedCrop, (draws, 2), drawn again until it fits."""
    source = np.random.default_rng(0)
    areas = source.uniform(0.08, 1, 2 * draws)
    ratios = np.exp(source.uniform(np.log(3 / 4), np.log(4 / 3), 2 * draws))
    fit = (areas * ratios * HEIGHT <= WIDTH) & (areas / ratios * WIDTH <= HEIGHT)
    return np.stack([areas, ratios], 1)[fit][:draws]


def test_imagenet_is_seen_in_random_parts_as_published(tmp_path: Path) -> None:
    """An image whose colours are its coordinates tells which part of it a view shows."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], 2).astype(np.uint8))
    for split, count in (("train", 50), ("val", 1)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                image.save(tmp_path / split / label / f"{number}.png")
    options = {"pair": "resnet34-resnet18", "dataset_name": tmp_path, "output_dir": tmp_path / "out", **LABELS_ALONE}
    trainer, _ = built("paper_cifar100", **options)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert trainer.train_dataset[0]["image"].size == (224, 224)
    found = []
    for epoch in range(8):
        trainer.train_dataset.epoch.fill_(epoch)
        for batch in trainer.get_train_dataloader():
            colours = 255 * (batch["pixel_values"] * std + mean)
            assert colours.shape[1:] == (3, 224, 224)
            assert float(colours[:, 2].abs().max()) < 0.01
            found.append(boxes(colours[:, :2].numpy()))
    left, top, width, height, mirrored = np.concatenate(found).T
    assert len(left) == 800
    assert min(left.min(), top.min()) > -1
    assert (left + width).max() < WIDTH + 1
    assert (top + height).max() < HEIGHT + 1
    areas, ratios = width * height / (WIDTH * HEIGHT), width / height
    assert 0.078 < areas.min() < 0.1
    assert 0.95 < areas.max() < 1.01
    assert 0.735 < ratios.min() < 0.77
    assert 1.31 < ratios.max() < 1.36
    wanted = published(50_000)
    assert ks_2samp(areas, wanted[:, 0]).statistic < 0.06
    assert ks_2samp(ratios, wanted[:, 1]).statistic < 0.06
    assert np.log(ratios).mean() == pytest.approx(np.log(wanted[:, 1]).mean(), abs=0.015)
    for start, side, whole in ((left, width, WIDTH), (top, height, HEIGHT)):
        free = whole - side > 30
        assert kstest((start / (whole - side))[free], "uniform").statistic < 0.08
    assert 0.44 < mirrored.mean() < 0.56
