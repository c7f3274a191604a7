"""Students made from their teacher's layers."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` that has only some of its layers, in the order given: the usual start for a smaller student.

    Sanh et al. 2019 (DistilBERT, arXiv 1910.01108) take every second layer of the teacher. Everything else, embeddings
    and head included, is copied too.

    Args:
        model: a model with one stack of `config.num_hidden_layers` equal layers: encoders or decoders, no pairs.
        layers: which layers to keep, counted from 0; `[0, 5]` makes a two-layer student.

    Raises:
        ValueError: for layers that the model does not have, or where it has no such stack.
    """
    count = model.config.num_hidden_layers
    stacks = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers; keep_layers needs exactly one."
        )
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"layers are {list(layers)}; expected numbers from 0 to {count - 1}.")
    config = type(model.config).from_dict(_settings_of(model.config.to_dict(), layers))
    config._attn_implementation = model.config._attn_implementation
    student = type(model)(config)
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    weights = model.state_dict()
    position = re.compile(rf"^({re.escape(stacks[0])}\.)(\d+)")
    for name in student.state_dict():
        source = position.sub(lambda match: f"{match[1]}{layers[int(match[2])]}", name)
        student.get_parameter_or_buffer(name).data.copy_(weights[source])
    student.to(dtype=model.dtype)  # type: ignore[call-arg]
    return student.train(model.training)


def _settings_of(settings: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The settings of a model that has these layers alone, from those of the whole one."""
    for name in ("layer_types", "no_rope_layers"):
        if settings.get(name):
            settings[name] = [settings[name][layer] for layer in layers]
    # What follows from the number of layers is derived again.
    derived = ("out_features", "out_indices", "stage_names")
    return {name: value for name, value in settings.items() if name not in derived} | {"num_hidden_layers": len(layers)}
