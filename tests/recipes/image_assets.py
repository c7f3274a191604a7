"""Tiny images on disk: scikit-learn's handwritten digits as PNG folders and as parquet."""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = {"train": range(0, 480), "test": range(480, 600)}


def digits(split: str) -> tuple[list[Image.Image], list[int]]:
    """Greyscale images of 8×8 and their labels."""
    data = load_digits()
    rows = np.random.default_rng(0).permutation(len(data.target))[SPLITS[split]]  # they are sorted by writer
    return [Image.fromarray(np.uint8(image * 15.9)) for image in data.images[rows]], data.target[rows].tolist()


def save_folder(folder: Path) -> Path:
    """`folder`/SPLIT/LABEL/NUMBER.png, as `imagefolder` reads it."""
    for split in SPLITS:
        for number, (image, label) in enumerate(zip(*digits(split), strict=True)):
            path = folder / split / str(label) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


def save_parquet(folder: Path) -> dict[str, Path]:
    """One file a split, of CIFAR-100's columns img and fine_label."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features(img=ImageFeature(), fine_label=ClassLabel(names=[str(digit) for digit in range(10)]))
    paths = {split: folder / f"{split}.parquet" for split in SPLITS}
    for split, path in paths.items():
        images, labels = digits(split)
        Dataset.from_dict({"img": images, "fine_label": labels}, features=features).to_parquet(path)
    return paths
