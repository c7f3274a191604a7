"""ResNets for 32×32 images: three stages of basic blocks (20 to 110 layers, 8x4, 32x4), or ResNet-50 with a 3×3 stem.

He et al., *Deep Residual Learning for Image Recognition* (CVPR 2016, arXiv 1512.03385), section 4.2 for CIFAR, with 1×1
convolutions where the shape changes, as RepDistiller has them (models/resnet.py and models/resnetv2.py).
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import relu
from transformers.configuration_utils import PreTrainedConfig

from .base import CifarImageClassifier, conv_norm, conv_norm_relu


class CifarResNetConfig(PreTrainedConfig):
    """`depths` blocks a stage; `hidden_sizes`: the channels that each stage puts out; `layer_type`: the kind of block,
    "basic" or "bottleneck". Each stage but the first halves height and width."""

    model_type = "cifar_resnet"

    embedding_size: int = 16
    hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    depths: list[int] | tuple[int, ...] = (3, 3, 3)
    layer_type: str = "basic"


def basic(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv_norm_relu(inputs, outputs, stride=stride), conv_norm(outputs, outputs))


def bottleneck(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    narrow = outputs // 4
    return nn.Sequential(
        conv_norm_relu(inputs, narrow, 1),
        conv_norm_relu(narrow, narrow, stride=stride),
        conv_norm(narrow, outputs, 1),
    )


LAYERS = {"basic": basic, "bottleneck": bottleneck}


class Block(nn.Module):
    """relu(shortcut(x) + residual(x))."""

    def __init__(self, layer_type: str, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = LAYERS[layer_type](inputs, outputs, stride)
        changes = stride > 1 or inputs != outputs
        self.shortcut = conv_norm(inputs, outputs, 1, stride=stride) if changes else nn.Identity()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return relu(self.shortcut(maps) + self.residual(maps))


def stages(config: CifarResNetConfig) -> Iterator[nn.Sequential]:
    inputs = config.embedding_size
    for stage, (outputs, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        first = Block(config.layer_type, inputs, outputs, stride=2 if stage else 1)
        yield nn.Sequential(first, *(Block(config.layer_type, outputs, outputs, stride=1) for _ in range(depth - 1)))
        inputs = outputs


class CifarResNetForImageClassification(CifarImageClassifier):
    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(
            config,
            stem=conv_norm_relu(3, config.embedding_size),
            stages=stages(config),
            features=config.hidden_sizes[-1],
        )
