"""The models of the CIFAR-100 distillation benchmark, for 32×32 images; importing this tells the Auto classes of them.

    model = AutoModelForImageClassification.from_config(config_of("resnet8x4"))

The benchmark is that of Tian et al., *Contrastive Representation Distillation* (ICLR 2020, arXiv 1910.10699); Zhao et
al. use the same models. Architectures and initialisation are those of its code, RepDistiller.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification
from transformers.configuration_utils import PreTrainedConfig

from .base import CifarImageClassifier
from .mobilenet_v2 import CifarMobileNetV2Config, CifarMobileNetV2ForImageClassification
from .resnet import CifarResNetConfig, CifarResNetForImageClassification
from .shufflenet_v1 import CifarShuffleNetV1Config, CifarShuffleNetV1ForImageClassification
from .shufflenet_v2 import CifarShuffleNetV2Config, CifarShuffleNetV2ForImageClassification
from .vgg import CifarVGGConfig, CifarVGGForImageClassification
from .wide_resnet import CifarWideResNetConfig, CifarWideResNetForImageClassification

__all__ = ["ARCHITECTURES", "CifarImageClassifier", "config_of"]

_MODELS: tuple[type[CifarImageClassifier], ...] = (
    CifarResNetForImageClassification,
    CifarWideResNetForImageClassification,
    CifarVGGForImageClassification,
    CifarMobileNetV2ForImageClassification,
    CifarShuffleNetV1ForImageClassification,
    CifarShuffleNetV2ForImageClassification,
)
for _model in _MODELS:
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForImageClassification.register(_model.config_class, _model, exist_ok=True)


def _resnet(depth: int, widen_factor: int = 1) -> Callable[..., PreTrainedConfig]:
    # A stem, two convolutions a block in three stages, a classifier. The "x4" models widen the stem by 2 only.
    return partial(
        CifarResNetConfig,
        embedding_size=16 if widen_factor == 1 else 32,
        hidden_sizes=tuple(channels * widen_factor for channels in (16, 32, 64)),
        depths=((depth - 2) // 6,) * 3,
    )


ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {
    "resnet8": _resnet(8),
    "resnet14": _resnet(14),
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "resnet56": _resnet(56),
    "resnet110": _resnet(110),
    "resnet8x4": _resnet(8, widen_factor=4),
    "resnet32x4": _resnet(32, widen_factor=4),
    "resnet50": partial(
        CifarResNetConfig,
        embedding_size=64,
        hidden_sizes=(256, 512, 1024, 2048),
        depths=(3, 4, 6, 3),
        layer_type="bottleneck",
    ),
    "wrn_16_2": partial(CifarWideResNetConfig, depth=16, widen_factor=2),
    "wrn_40_1": partial(CifarWideResNetConfig, depth=40, widen_factor=1),
    "wrn_40_2": partial(CifarWideResNetConfig, depth=40, widen_factor=2),
    "vgg8": partial(CifarVGGConfig, depths=(1, 1, 1, 1, 1)),
    "vgg13": partial(CifarVGGConfig, depths=(2, 2, 2, 2, 2)),
    "mobilenet_v2": CifarMobileNetV2Config,
    "shufflenet_v1": CifarShuffleNetV1Config,
    "shufflenet_v2": CifarShuffleNetV2Config,
}
"""Name of a model of the benchmark → what makes its configuration. resnet8 and resnet14 serve reduced runs."""


def config_of(name: str, num_labels: int = 100, **changes: Any) -> PreTrainedConfig:
    """The configuration of a model of the benchmark, with `changes` to its fields.

    Raises:
        ValueError: where `name` is not in `ARCHITECTURES`.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"There is no model {name!r}; expected one of {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name](num_labels=num_labels, **changes)
