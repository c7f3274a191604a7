"""What the models of the benchmark share: a stem, stages, global average pooling and a linear classifier."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, initialization
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class CifarImageClassifier(PreTrainedModel):
    """Logits of `classifier(mean over the pixels of tail(stages(stem(pixel_values))))`.

    Convolutions start from He's normal distribution over the fan-out, batch normalisation from weight 1 and bias 0, the
    classifier as in PyTorch, or from a normal distribution of `classifier_std`; families whose published code does
    otherwise override `_init_weights`.

    Args:
        config: with `num_labels`.
        stem: (B, 3, H, W) → the first feature map.
        stages: each takes the feature map of the one before.
        features: channels after `tail`.
        tail: what stands between the last stage and the pooling.
    """

    config_class: type[PreTrainedConfig]
    classifier_std: float | None = None
    main_input_name = "pixel_values"

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        features: int,
        tail: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.tail = tail if tail is not None else nn.Identity()
        self.classifier = nn.Linear(features, config.num_labels or 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and self.classifier_std is not None:
            initialization.normal_(module.weight, std=self.classifier_std)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """Logits, the mean cross-entropy where `labels` are given, and on request the feature maps.

        Args:
            pixel_values: (B, 3, H, W), floating point; published for H = W = 32, and 16 works too.
            labels: (B,) classes, or (B, C) probabilities.
            output_hidden_states: also return the output of the stem and of each stage, (B, channels, height, width).
            return_dict: False for a tuple without the missing parts.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        maps = [self.stem(pixel_values)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        logits = self.classifier(self.tail(maps[-1]).mean((2, 3)))
        output = ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=tuple(maps) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


def conv_norm(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, without bias, and batch normalisation."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """`conv_norm` followed by ReLU."""
    return conv_norm(inputs, outputs, kernel, stride=stride, groups=groups).append(nn.ReLU())


def shuffle_channels(maps: torch.Tensor, groups: int) -> torch.Tensor:
    """Deal the channels of (B, C, H, W) out so that each of `groups` equal parts gets some of every other part."""
    return maps.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
