"""Each family of the benchmark beside its published architecture, written once more as functions of its weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .launching import recipe
from .test_cifar_models import model_of

cifar_models = recipe("cifar_models")


class Weights:
    """The weights of a model in the order in which it registers them, which is that of the text below."""

    def __init__(self, model: Any) -> None:
        self.names = iter(model.named_parameters())

    def next(self, dimensions: int) -> Tensor:
        name, value = next(self.names)
        assert value.ndim == dimensions, (name, tuple(value.shape))
        return value.detach()

    def conv(self, maps: Tensor, stride: int = 1, *, bias: bool = False) -> Tensor:
        weight = self.next(4)
        return F.conv2d(
            maps,
            weight,
            self.next(1) if bias else None,
            stride,
            padding=weight.shape[-1] // 2,
            groups=maps.shape[1] // weight.shape[1],
        )

    def norm(self, maps: Tensor) -> Tensor:
        return F.batch_norm(maps, None, None, self.next(1), self.next(1), training=True)

    def conv_norm(self, maps: Tensor, stride: int = 1) -> Tensor:
        return self.norm(self.conv(maps, stride))

    def classifier(self, maps: Tensor) -> Tensor:
        pooled = maps.mean((2, 3))
        return pooled @ self.next(2).T + self.next(1)


def shuffle(maps: Tensor, groups: int) -> Tensor:
    """Channel g · n + i comes to stand at i · groups + g."""
    each = maps.shape[1] // groups
    return maps[:, [g * each + i for i in range(each) for g in range(groups)]]


def resnet(blocks: tuple[int, ...], bottleneck: bool = False) -> Callable[[Weights, Tensor], Tensor]:
    """He et al. 2016: conv-norm-ReLU-conv-norm, or with 1×1 around; plus the input, projected where a stage begins."""

    def forward(w: Weights, x: Tensor) -> Tensor:
        x = w.conv_norm(x).relu()
        for stage, depth in enumerate(blocks):
            for block in range(depth):
                stride, inputs = 2 if stage and not block else 1, x
                if bottleneck:
                    x = w.conv_norm(w.conv_norm(w.conv_norm(x).relu(), stride).relu())
                else:
                    x = w.conv_norm(w.conv_norm(x, stride).relu())
                if x.shape != inputs.shape:
                    inputs = w.conv_norm(inputs, stride)
                x = (x + inputs).relu()
        return w.classifier(x)

    return forward


def wide_resnet(w: Weights, x: Tensor, blocks: int) -> Tensor:
    """Zagoruyko and Komodakis 2016: norm-ReLU-conv twice; where the width changes, the shortcut leaves after ReLU."""
    x = w.conv(x)
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            active = w.norm(x).relu()
            residual = w.conv(w.conv_norm(active, stride).relu())
            x = residual + (x if residual.shape == x.shape else w.conv(active, stride))
    return w.classifier(w.norm(x).relu())


def vgg(w: Weights, x: Tensor, layers: int) -> Tensor:
    """Simonyan and Zisserman 2015, with batch normalisation: five groups, max pooling after three."""
    for group in range(5):
        for _ in range(layers):
            x = w.norm(w.conv(x, bias=True)).relu()
        x = F.max_pool2d(x, 2) if group < 3 else x
    return w.classifier(x)


def mobilenet_v2(w: Weights, x: Tensor) -> Tensor:
    """Sandler et al. 2018, table 2, with the strides of small images: the narrow end of a block is linear."""
    x = w.conv_norm(x, 2).relu()
    for blocks, first_stride in ((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)):
        for block in range(blocks):
            stride, inputs = 1 if block else first_stride, x
            x = w.conv_norm(w.conv_norm(w.conv_norm(x).relu(), stride).relu())
            x = x + inputs if stride == 1 and x.shape == inputs.shape else x
    return w.classifier(w.conv_norm(x).relu())


def shufflenet_v1(w: Weights, x: Tensor) -> Tensor:
    """Zhang et al. 2018, figure 2 (b) and (c): grouped 1×1, shuffle, depthwise, grouped 1×1."""
    x = w.conv_norm(x).relu()
    for stage, depth in enumerate((4, 8, 4)):
        for block in range(depth):
            stride, inputs = 1 if block else 2, x
            groups = 1 if stage == block == 0 else 3
            x = shuffle(w.conv_norm(x).relu(), groups)
            x = w.conv_norm(w.conv_norm(x, stride).relu())
            x = x + inputs if stride == 1 else torch.cat([x, F.avg_pool2d(inputs, 3, 2, padding=1)], 1)
            x = x.relu()
    return w.classifier(x)


def shufflenet_v2(w: Weights, x: Tensor) -> Tensor:
    """Ma et al. 2018, figure 3 (c) and (d): no activation follows a depthwise convolution."""
    x = w.conv_norm(x).relu()
    for depth in (4, 8, 4):
        left = w.conv_norm(w.conv_norm(x, 2)).relu()
        right = w.conv_norm(w.conv_norm(w.conv_norm(x).relu(), 2)).relu()
        x = shuffle(torch.cat([left, right], 1), 2)
        for _ in range(depth - 1):
            left, right = x.chunk(2, 1)
            right = w.conv_norm(w.conv_norm(w.conv_norm(right).relu())).relu()
            x = shuffle(torch.cat([left, right], 1), 2)
    return w.classifier(w.conv_norm(x).relu())


REFERENCES: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "resnet20": resnet((3, 3, 3)),
    "resnet8x4": resnet((1, 1, 1)),
    "resnet50": resnet((3, 4, 6, 3), bottleneck=True),
    "wrn_16_2": lambda w, x: wide_resnet(w, x, blocks=2),
    "wrn_40_1": lambda w, x: wide_resnet(w, x, blocks=6),
    "vgg8": lambda w, x: vgg(w, x, layers=1),
    "vgg13": lambda w, x: vgg(w, x, layers=2),
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2": shufflenet_v2,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_model_is_the_published_architecture(name: str) -> None:
    model = model_of(name, num_labels=10).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # 1 and 0 would hide where it stands
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        images = torch.randn(4, 3, 16, 16)
        weights = Weights(model)
        wanted = REFERENCES[name](weights, images)
        torch.testing.assert_close(model(images).logits, wanted, rtol=0, atol=1e-5)
    assert next(weights.names, None) is None
