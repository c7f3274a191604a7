"""ShuffleNet (V1) for 32×32 images, with three groups.

Zhang et al., *ShuffleNet* (CVPR 2018, arXiv 1707.01083), in the form of RepDistiller (models/ShuffleNetv1.py): a 1×1
stem that keeps the size, and PyTorch's own initialisation.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, relu
from transformers.configuration_utils import PreTrainedConfig

from .base import CifarImageClassifier, conv_norm, conv_norm_relu, shuffle_channels


class CifarShuffleNetV1Config(PreTrainedConfig):
    """`depths` blocks of `hidden_sizes` channels a stage, the first of which halves height and width; `groups` of their
    1×1 convolutions."""

    model_type = "cifar_shufflenet_v1"

    embedding_size: int = 24
    hidden_sizes: list[int] | tuple[int, ...] = (240, 480, 960)
    depths: list[int] | tuple[int, ...] = (4, 8, 4)
    groups: int = 3


class Block(nn.Module):
    """relu(x + residual(x)); at stride 2 relu of the two side by side, the input averaged.

    `groups_in`: groups of the first convolution, 1 where the input has too few channels to be split.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups_in: int, groups: int) -> None:
        super().__init__()
        channels = outputs - inputs if stride == 2 else outputs
        narrow = channels // 4
        self.groups_in, self.stride = groups_in, stride
        self.reduce = conv_norm_relu(inputs, narrow, 1, groups=groups_in)
        self.depthwise = conv_norm_relu(narrow, narrow, stride=stride, groups=narrow)
        self.expand = conv_norm(narrow, channels, 1, groups=groups)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        residual = self.expand(self.depthwise(shuffle_channels(self.reduce(maps), self.groups_in)))
        if self.stride == 1:
            return relu(maps + residual)
        return relu(torch.cat([residual, avg_pool2d(maps, 3, stride=2, padding=1)], dim=1))


def stages(config: CifarShuffleNetV1Config) -> Iterator[nn.Sequential]:
    inputs, groups = config.embedding_size, config.groups
    for stage, (outputs, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        first = Block(inputs, outputs, 2, groups_in=groups if stage else 1, groups=groups)
        yield nn.Sequential(first, *(Block(outputs, outputs, 1, groups, groups) for _ in range(depth - 1)))
        inputs = outputs


class CifarShuffleNetV1ForImageClassification(CifarImageClassifier):
    config_class = CifarShuffleNetV1Config

    def __init__(self, config: CifarShuffleNetV1Config) -> None:
        super().__init__(
            config,
            stem=conv_norm_relu(3, config.embedding_size, 1),
            stages=stages(config),
            features=config.hidden_sizes[-1],
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        else:
            super()._init_weights(module)
