"""MobileNetV2 for 32×32 images, at half width.

Sandler et al., *MobileNetV2: Inverted Residuals and Linear Bottlenecks* (CVPR 2018, arXiv 1801.04381), in the form of
RepDistiller (models/mobilenetv2.py): a stem of stride 2, two more halvings, ReLU in the place of ReLU6, the pointwise
expansion kept in the first block too, where it does not widen, and no dropout.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .base import CifarImageClassifier, conv_norm, conv_norm_relu


class CifarMobileNetV2Config(PreTrainedConfig):
    """All channels but the last `last_hidden_size` are those of the paper times `depth_multiplier`, rounded down;
    `expand_ratio`: how much a block widens inside."""

    model_type = "cifar_mobilenet_v2"

    depth_multiplier: float = 0.5
    expand_ratio: int = 6
    last_hidden_size: int = 1280


# Channels, blocks and stride of each stage (table 2 of the paper, strides for small images).
STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class Block(nn.Module):
    """Widen, convolve each channel by itself, narrow; plus the input, where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        wide = inputs * expand_ratio
        self.residual = nn.Sequential(
            conv_norm_relu(inputs, wide, 1),
            conv_norm_relu(wide, wide, stride=stride, groups=wide),
            conv_norm(wide, outputs, 1),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.residual(maps) if self.has_shortcut else self.residual(maps)


def stages(config: CifarMobileNetV2Config) -> Iterator[nn.Sequential]:
    inputs = int(32 * config.depth_multiplier)
    for stage, (channels, depth, stride) in enumerate(STAGES):
        outputs, ratio = int(channels * config.depth_multiplier), config.expand_ratio if stage else 1
        first = Block(inputs, outputs, stride, ratio)
        yield nn.Sequential(first, *(Block(outputs, outputs, 1, ratio) for _ in range(depth - 1)))
        inputs = outputs


class CifarMobileNetV2ForImageClassification(CifarImageClassifier):
    config_class = CifarMobileNetV2Config
    classifier_std = 0.01

    def __init__(self, config: CifarMobileNetV2Config) -> None:
        last = int(STAGES[-1][0] * config.depth_multiplier)
        super().__init__(
            config,
            stem=conv_norm_relu(3, int(32 * config.depth_multiplier), stride=2),
            stages=stages(config),
            features=config.last_hidden_size,
            tail=conv_norm_relu(last, config.last_hidden_size, 1),
        )
