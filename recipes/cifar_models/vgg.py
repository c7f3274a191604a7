"""VGGs for 32×32 images: VGG-8 and VGG-13 with batch normalisation and one linear layer.

Simonyan and Zisserman, *Very Deep Convolutional Networks* (ICLR 2015, arXiv 1409.1556), in the form of RepDistiller
(models/vgg.py): of the five groups the first three are followed by max pooling, the last by global average pooling.
"""

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .base import CifarImageClassifier


class CifarVGGConfig(PreTrainedConfig):
    """`depths` convolutions of `hidden_sizes` channels a group."""

    model_type = "cifar_vgg"

    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: list[int] | tuple[int, ...] = (1, 1, 1, 1, 1)


def group(inputs: int, outputs: int, depth: int, *, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    for layer in range(depth):
        convolution = nn.Conv2d(outputs if layer else inputs, outputs, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class CifarVGGForImageClassification(CifarImageClassifier):
    config_class = CifarVGGConfig
    classifier_std = 0.01

    def __init__(self, config: CifarVGGConfig) -> None:
        sizes, depths = config.hidden_sizes, config.depths
        super().__init__(
            config,
            stem=group(3, sizes[0], depths[0], pool=False),
            stages=[group(sizes[i - 1], sizes[i], depths[i], pool=i < 4) for i in range(1, len(sizes))],
            features=sizes[-1],
        )
