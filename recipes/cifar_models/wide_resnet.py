"""Wide ResNets for 32×32 images: WRN-16-2, WRN-40-1, WRN-40-2.

Zagoruyko and Komodakis, *Wide Residual Networks* (BMVC 2016, arXiv 1605.07146), without dropout, as in RepDistiller
(models/wrn.py): batch normalisation and ReLU stand before the convolutions.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import initialization
from transformers.configuration_utils import PreTrainedConfig

from .base import CifarImageClassifier, conv_norm_relu


class CifarWideResNetConfig(PreTrainedConfig):
    """`depth` layers, 6n + 4 for n blocks a stage; 16, 32 and 64 channels, times `widen_factor`."""

    model_type = "cifar_wide_resnet"

    depth: int = 16
    widen_factor: int = 2


def norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """x + residual(activation(x)); where the shape changes, shortcut(activation(x)) + residual(activation(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = norm_relu(inputs)
        self.residual = nn.Sequential(conv_norm_relu(inputs, outputs, stride=stride), conv(outputs, outputs))
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        active = self.activation(maps)
        shortcut = maps if self.shortcut is None else self.shortcut(active)
        return shortcut + self.residual(active)


def stages(config: CifarWideResNetConfig) -> Iterator[nn.Sequential]:
    inputs = 16
    for stage in range(3):
        outputs = 16 * 2**stage * config.widen_factor
        first = Block(inputs, outputs, stride=2 if stage else 1)
        yield nn.Sequential(first, *(Block(outputs, outputs, stride=1) for _ in range((config.depth - 4) // 6 - 1)))
        inputs = outputs


class CifarWideResNetForImageClassification(CifarImageClassifier):
    config_class = CifarWideResNetConfig

    def __init__(self, config: CifarWideResNetConfig) -> None:
        if config.depth % 6 != 4:
            raise ValueError(f"depth is {config.depth}; expected 6n + 4 for n blocks a stage, such as 16 or 40.")
        features = 64 * config.widen_factor
        super().__init__(config, stem=conv(3, 16), stages=stages(config), features=features, tail=norm_relu(features))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            initialization.zeros_(module.bias)
