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
    names = ("input_ids", "decoder_input_ids", "labels", "teacher_input_ids")
    shapes = {batch[name].shape for name in names if isinstance(batch.get(name), Tensor)}
    tokens = {
        name: value[:1, :_TRIED_TOKENS]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape in shapes
    }
    for name, value in tokens.items():
        if "attention_mask" in name:
            tokens[name] = torch.ones_like(value)
        elif "labels" in name:
            tokens[name] = value.clamp(min=0)
    return tokens


def tried(
    model: nn.Module,
    head: LanguageHead | None,
    inputs: Mapping[str, Any],
    labels: Tensor | None = None,
    without_labels: Mapping[str, Any] | None = None,
    half_precision: bool = False,
) -> Trial:
    """Run `model` on `inputs`, a few tokens, and compare. It stays in its mode, and random numbers are drawn anew.

    Args:
        model: the model, in whatever wrapper it trains.
        head: its `language_head`.
        labels: (B, L), where their logits stand, for a model whose `inputs` hold labels: its own loss is tried too.
        without_labels: the inputs that such a model gets where its loss is not wanted: the logits must be the same.
        half_precision: products are rounded, as under autocast, and equal to the digits of that.
    """
    if any(hasattr(module, "set_attention_type") for module in model.modules()):
        return Trial(None, False, "it takes another attention for short texts, and keeps it")
    try:
        logits, made, outputs = _run(model, head, inputs)
        plain = labels is not None and _is_cross_entropy(outputs, logits, labels)
        if plain and without_labels is not None:
            again = _run(model, None, without_labels)[0]
            plain = again.shape == logits.shape and torch.equal(again, logits)
    except Exception as error:  # whatever a model makes of inputs that it does not know
        return Trial(None, False, f"it could not be tried on a few tokens ({type(error).__name__}: {error})")
    if labels is not None and not plain:
        return Trial(None, False, "its loss is not the cross-entropy of the logits that it makes without labels too")
    if made is None:
        return Trial(None, plain, "its head is not one linear layer")
    half_precision = half_precision or made.dtype in (torch.float16, torch.bfloat16)
    tolerance = (0.02 if half_precision else 1e-4) * logits.abs().max().item()
    if made.shape != logits.shape or not torch.allclose(made.float(), logits, rtol=0, atol=tolerance):
        return Trial(None, plain, "its logits are not what its last layer makes of hidden states")
    return Trial(head, plain)


@torch.no_grad()
def _run(model: nn.Module, head: LanguageHead | None, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
    """The logits of `model`, what its `head` makes of the hidden states in front of it, and the outputs."""
    seen: list[Tensor] = []

    def in_front(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert head is not None
        with torch.autocast(given[0].device.type, enabled=False):
            hidden = given[0].flatten(0, -2).to(head.layer.weight.dtype)
            seen.append(head.weights().logits(hidden).view(*given[0].shape[:-1], -1))

    device = next(iter(inputs.values())).device
    on_cpu = device.type == "cpu"
    handle = None if head is None else head.layer.register_forward_pre_hook(in_front)
    try:
        # Both runs drop the same units out, and training draws what it would have drawn.
        with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
            outputs = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    return rows.logits_of(outputs, "model").float(), seen[0] if len(seen) == 1 else None, outputs


def _is_cross_entropy(outputs: Any, logits: Tensor, labels: Tensor) -> bool:
    """Whether the loss in `outputs` is that of their logits and nothing more."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if loss is None or logits.shape[:-1] != labels.shape or outputs.get("aux_loss") is not None:
        return False
    expected = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=rows.IGNORE_INDEX)
    return torch.allclose(loss.float(), expected, rtol=2e-6, atol=1e-6)
