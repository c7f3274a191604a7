"""ShuffleNetV2 for 32×32 images, at size 1.

Ma et al., *ShuffleNet V2* (ECCV 2018, arXiv 1807.11164), in the form of RepDistiller (models/ShuffleNetv2.py): a 1×1
stem that keeps the size, and PyTorch's own initialisation.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .base import CifarImageClassifier, conv_norm, conv_norm_relu, shuffle_channels


class CifarShuffleNetV2Config(PreTrainedConfig):
    """`depths` blocks of `hidden_sizes` channels a stage, the first of which halves height and width; a 1×1 convolution
    to `last_hidden_size` channels before the pooling."""

    model_type = "cifar_shufflenet_v2"

    embedding_size: int = 24
    hidden_sizes: list[int] | tuple[int, ...] = (116, 232, 464)
    last_hidden_size: int = 1024
    depths: list[int] | tuple[int, ...] = (4, 8, 4)


def branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm_relu(inputs, outputs, 1),
        conv_norm(outputs, outputs, stride=stride, groups=outputs),
        conv_norm_relu(outputs, outputs, 1),
    )


class Block(nn.Module):
    """Half of the channels passes as it is, the other half through a branch; then the two are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = branch(channels // 2, channels // 2, stride=1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        kept, changed = maps.chunk(2, dim=1)
        return shuffle_channels(torch.cat([kept, self.branch(changed)], dim=1), groups=2)


class DownBlock(nn.Module):
    """Half the size: all channels pass through two branches, each of which puts out half of the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(
            conv_norm(inputs, inputs, stride=2, groups=inputs), conv_norm_relu(inputs, outputs // 2, 1)
        )
        self.branch = branch(inputs, outputs // 2, stride=2)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return shuffle_channels(torch.cat([self.shortcut(maps), self.branch(maps)], dim=1), groups=2)


def stages(config: CifarShuffleNetV2Config) -> Iterator[nn.Sequential]:
    inputs = config.embedding_size
    for outputs, depth in zip(config.hidden_sizes, config.depths, strict=True):
        yield nn.Sequential(DownBlock(inputs, outputs), *(Block(outputs) for _ in range(depth - 1)))
        inputs = outputs


class CifarShuffleNetV2ForImageClassification(CifarImageClassifier):
    config_class = CifarShuffleNetV2Config

    def __init__(self, config: CifarShuffleNetV2Config) -> None:
        super().__init__(
            config,
            stem=conv_norm_relu(3, config.embedding_size, 1),
            stages=stages(config),
            features=config.last_hidden_size,
            tail=conv_norm_relu(config.hidden_sizes[-1], config.last_hidden_size, 1),
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        else:
            super()._init_weights(module)
