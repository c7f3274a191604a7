"""A language model's head, taken apart: hidden states in front of it, and what it makes of them.

The fused loss wants hidden states instead of logits. A hook on the model's own head hands them over inside the model's
own forward, where wrappers have gathered the weights, and lets the head run on no positions. Whether the logits are
really what the head and its scale say, and the model's loss really their cross-entropy, is tried out once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from . import rows
from .heads import bare_model
from .losses.fused_linear import LinearHead

_TRIED_TOKENS = 16


class LanguageHead(NamedTuple):
    """The last layer of a language model, and how its outputs become logits."""

    layer: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    def weights(self) -> LinearHead:
        """Its weights as they are now: inside the model's forward, where they are sharded."""
        return LinearHead(self.layer.weight, self.layer.bias, self.logit_scale, self.softcap)

    @contextmanager
    def handing_over(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Within, a forward of the model gives hidden states (B, L, d) to `take`, and makes logits of no positions."""

        def in_front(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            take(inputs[0])
            return (inputs[0][..., :0, :], *inputs[1:])

        handle = self.layer.register_forward_pre_hook(in_front)
        try:
            yield
        finally:
            handle.remove()


class Trial(NamedTuple):
    """What a trial of a language model showed."""

    head: LanguageHead | None
    """Its head, where that alone makes the logits."""
    plain_loss: bool
    """Whether its own loss is the mean cross-entropy of its logits at the labels."""
    reason: str = ""
    """The first of the two that does not hold."""


def language_head(model: nn.Module) -> LanguageHead | None:
    """The head of `model`, where it is one linear layer without an adapter; None otherwise."""
    bare = bare_model(model)
    layer = bare.get_output_embeddings() if isinstance(bare, PreTrainedModel) else None
    # FSDP2 makes classes of its own, which compute the same; those of adapters and quantization do not.
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    if not isinstance(bare, PreTrainedModel) or not isinstance(layer, nn.Linear) or not plain:
        return None
    text = bare.config.get_text_config(decoder=True)
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1)
    return LanguageHead(layer, float(scale), getattr(text, "final_logit_softcapping", None))


def first_tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first tokens of the first example of `batch`, all of them visible and labelled."""
    tokens = {
        name: value[:1, :_TRIED_TOKENS]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.ndim == 2
    }
    for name, value in tokens.items():
        if "attention_mask" in name:
            tokens[name] = torch.ones_like(value)
        elif "labels" in name:
            tokens[name] = value.clamp(min=0)
    return tokens


@torch.no_grad()
def tried(
    model: nn.Module,
    head: LanguageHead | None,
    inputs: Mapping[str, Any],
    labels: Tensor | None = None,
    half_precision: bool = False,
) -> Trial:
    """Run `model` once on `inputs`, a few tokens, in eval mode; training goes on as if it had not been.

    Args:
        model: the model, in whatever wrapper it trains.
        head: its `language_head`.
        labels: (B, L), where their logits stand, for a model whose `inputs` hold labels: its own loss is tried too.
        half_precision: products are rounded, as under autocast, and equal to the digits of that.
    """
    seen: list[Tensor] = []

    def in_front(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert head is not None
        with torch.autocast(given[0].device.type, enabled=False):
            hidden = given[0].flatten(0, -2).to(head.layer.weight.dtype)
            seen.append(head.weights().logits(hidden).view(*given[0].shape[:-1], -1))

    handle = None if head is None else head.layer.register_forward_pre_hook(in_front)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        outputs = model(**inputs)
        logits = rows.logits_of(outputs, "model").float()
    finally:
        if handle is not None:
            handle.remove()
        for module in training:
            module.training = True
    if labels is not None:
        expected = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=rows.IGNORE_INDEX)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None or not torch.allclose(loss.float(), expected, rtol=1e-4, atol=1e-5):
            return Trial(None, False, "its loss is not the cross-entropy of its logits")
    if head is None or len(seen) != 1:
        return Trial(None, labels is not None, "its head is not one linear layer")
    made = seen[0].float()
    half_precision = half_precision or seen[0].dtype in (torch.float16, torch.bfloat16)
    tolerance = (0.02 if half_precision else 1e-4) * logits.abs().max().item()
    if made.shape != logits.shape or not torch.allclose(made, logits, rtol=0, atol=tolerance):
        return Trial(None, labels is not None, "its logits are not what its last layer makes of hidden states")
    return Trial(head, labels is not None)
