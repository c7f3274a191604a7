"""Images that live on the device."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from hf_dkd.device_images import DeviceImages, as_it_is, pixels_of

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def images(count: int = 6, **options: Any) -> tuple[DeviceImages, Tensor]:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (count, 8, 10, 3), dtype=np.uint8))
    data = DeviceImages(pixels, torch.arange(count), mean=MEAN, std=STD, device="cpu", **options)
    return data, pixels


def in_colours(batch: dict[str, Tensor]) -> Tensor:
    """The bytes (B, H, W, 3) that normalised pixels were."""
    values = batch["pixel_values"] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (255 * values).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_a_batch_is_taken_and_normalised() -> None:
    data, pixels = images()
    batch = data.__getitems__([4, 1, 1])
    assert batch["labels"].tolist() == [4, 1, 1]
    wanted = (pixels[[4, 1, 1]].double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(batch["pixel_values"].double(), wanted.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert batch["pixel_values"].dtype == torch.float32
    assert len(data) == 6
    assert torch.equal(data[4]["pixel_values"], batch["pixel_values"][0])


def test_views_are_shifted_out_of_a_black_border_and_mirrored() -> None:
    data, pixels = images(count=400, padding=2, mirror=True)
    pixels[:] = pixels[:1]
    data.pixels[:] = data.pixels[:1]
    bordered = np.pad(pixels[0].numpy(), ((2, 2), (2, 2), (0, 0)))
    windows = [bordered[y : y + 8, x : x + 10] for y in range(5) for x in range(5)]
    possible = {window.tobytes(): number for number, window in enumerate(windows)}
    possible |= {window[:, ::-1].tobytes(): 25 + number for number, window in enumerate(windows)}
    seen = [possible[view.numpy().tobytes()] for view in in_colours(data.__getitems__(range(400)))]
    assert len(set(seen)) == 50
    assert 160 < sum(number >= 25 for number in seen) < 240


def test_seed_epoch_and_index_determine_a_view() -> None:
    def views(seed: int, epoch: int, indices: list[int]) -> Tensor:
        data, _ = images(padding=3, mirror=True, seed=seed)
        data.epoch.fill_(epoch)
        return data.__getitems__(indices)["pixel_values"]

    first = views(0, 2, [0, 1, 2, 3, 4, 5])
    assert torch.equal(first[[5, 2]], views(0, 2, [5, 2]))
    assert not torch.equal(first, views(0, 3, [0, 1, 2, 3, 4, 5]))
    assert not torch.equal(first, views(1, 2, [0, 1, 2, 3, 4, 5]))
    data, _ = images(padding=3, mirror=True)
    before = data.__getitems__([0, 1, 2])["pixel_values"]
    data.epoch.fill_(1)  # without a new data set, as between epochs
    assert not torch.equal(before, data.__getitems__([0, 1, 2])["pixel_values"])


def test_a_loader_takes_whole_batches() -> None:
    data, _ = images()
    batches = list(DataLoader(data, batch_size=4, collate_fn=as_it_is))
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [batch["pixel_values"].shape for batch in batches] == [(4, 3, 8, 10), (2, 3, 8, 10)]


def test_workers_are_refused() -> None:
    data, _ = images()
    with pytest.raises(RuntimeError, match="set dataloader_num_workers=0"):
        next(iter(DataLoader(data, batch_size=4, collate_fn=as_it_is, num_workers=1)))


def test_a_selection_has_no_views() -> None:
    data, pixels = images(padding=2, mirror=True)
    some = data.select(range(2, 4))
    assert some.labels.tolist() == [2, 3]
    assert torch.equal(in_colours(some.__getitems__([0, 1])), pixels[2:4])


def test_images_are_decoded_to_a_size_in_rgb() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8))
    rows = Dataset.from_dict({"image": [picture, picture], "labels": [0, 1]})
    whole = pixels_of(rows, 8)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole[1], torch.from_numpy(np.array(picture)).unsqueeze(2).expand(8, 8, 3))
    half = pixels_of(rows, 4)
    assert half.shape == (2, 4, 4, 3)
    assert float((half.float().mean() - whole.float().mean()).abs()) < 3


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(2, 4, 4, 3), torch.zeros(2)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3)),
    ],
)
def test_other_pixels_are_refused(pixels: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, H, W, 3\), uint8, and \(N,\)"):
        DeviceImages(pixels, labels, mean=MEAN, std=STD, device="cpu")
