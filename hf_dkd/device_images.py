"""Small images that live on the device: a batch is taken, moved, mirrored and normalised there by a few operations.

For data sets such as CIFAR, whose images a GPU could otherwise train on faster than a processor makes them ready. They
need Pillow (`pip install "hf-dkd[recipes]"`) and are imported by nothing else in the package.
"""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import Resampling
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import get_worker_info


def pixels_of(rows: Dataset, size: int, column: str = "image") -> Tensor:
    """The images of a column, (N, size, size, 3), uint8. They are decoded once: datasets keeps the outcome on disk."""

    def decode(row: dict[str, Any]) -> dict[str, bytes]:
        image = row[column].convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Resampling.BILINEAR)
        return {"pixels": image.tobytes()}

    raw = rows.select_columns([column]).map(decode, remove_columns=[column], desc="Decoding images")
    return torch.frombuffer(bytearray(b"".join(raw["pixels"])), dtype=torch.uint8).view(-1, size, size, 3)


class DeviceImages(torch.utils.data.Dataset):
    """Images and labels on a device, as batches of `pixel_values` (B, 3, H, W), float32, and `labels` (B,).

    PyTorch's loader asks for a batch as a whole, so that a `data_collator` gets it finished: pass `as_it_is`. Loading
    goes without workers and pinned memory (`dataloader_num_workers=0, dataloader_pin_memory=False`), and Trainer must
    keep the columns (`remove_unused_columns=False`).

    Training views are a random crop out of a black border and a mirror image every other time. Seed, epoch and index
    determine them, as in `AugmentedImages`, on any number of processes and after resuming; `CountEpochs` tells the
    epoch.

    Args:
        pixels: (N, H, W, 3), uint8.
        labels: (N,), integers.
        mean: of each colour, in [0, 1].
        std: the same, above 0.
        device: where everything is kept.
        padding: pixels of the border; 0 does not crop.
        mirror: whether images are mirrored.
        seed: two runs with the same seed see the same views.

    Raises:
        ValueError: for pixels of another shape or dtype, and for another number of labels.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        padding: int = 0,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(labels) != len(pixels):
            raise ValueError(
                f"pixels are {tuple(pixels.shape)}, {pixels.dtype}, and labels {tuple(labels.shape)}; expected "
                "(N, H, W, 3), uint8, and (N,): `pixels_of` makes such pixels."
            )
        self.height, self.width = pixels.shape[1:3]
        self.pixels = pad(pixels, (0, 0, padding, padding, padding, padding)).to(device)
        self.labels = labels.to(device)
        self.mean, self.std = (255 * torch.tensor(values, device=device) for values in (mean, std))
        self.padding, self.mirror, self.seed = padding, mirror, seed
        self.epoch = torch.zeros((), dtype=torch.long)
        self._drawn: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch of these examples.

        Raises:
            RuntimeError: in a worker of a loader, which would not see the epochs change.
        """
        if get_worker_info() is not None:
            raise RuntimeError("DeviceImages was asked by a worker; expected none: set dataloader_num_workers=0.")
        self._draw()
        at = torch.tensor(indices)
        if self.labels.is_cuda:  # out of pinned memory the host need not wait for the copy
            at = at.pin_memory()
        at = at.to(self.labels.device, non_blocking=self.labels.is_cuda)
        rows, columns = (
            offset[at].unsqueeze(1) + torch.arange(length, device=at.device)
            for offset, length in ((self._top, self.height), (self._left, self.width))
        )
        columns = torch.where(self._mirrored[at].unsqueeze(1), columns.flip(1), columns)
        images = self.pixels[at.view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]
        return {
            "pixel_values": ((images - self.mean) / self.std).permute(0, 3, 1, 2).contiguous(),
            "labels": self.labels[at],
        }

    def select(self, indices: Sequence[int]) -> "DeviceImages":
        """These examples alone, without the border."""
        border, at = self.padding, torch.as_tensor(list(indices), device=self.labels.device)
        whole = self.pixels[:, border : border + self.height, border : border + self.width]
        mean, std = ((values / 255).tolist() for values in (self.mean, self.std))
        return DeviceImages(whole[at], self.labels[at], mean=mean, std=std, device=self.labels.device)

    def _draw(self) -> None:
        """The views of all examples in this epoch: drawn on the processor, so that all devices draw the same."""
        epoch = int(self.epoch)
        if epoch == self._drawn:
            return
        source = torch.Generator().manual_seed(hash((self.seed, epoch)))
        offsets = torch.randint(2 * self.padding + 1, (2, len(self)), generator=source).to(self.labels.device)
        self._top, self._left = offsets
        mirrored = torch.rand(len(self), generator=source) < (0.5 if self.mirror else 0)
        self._mirrored = mirrored.to(self.labels.device)
        self._drawn = epoch


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `data_collator` of data that comes in batches."""
    return batch
