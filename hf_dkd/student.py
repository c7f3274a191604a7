"""Students made from other models: some of the layers, other settings, an adapter."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# What follows from other settings, as stage names from depths: kept, it would not fit changed ones.
_DERIVED = ("out_features", "out_indices", "stage_names")


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
    config = change_config(model.config, _settings_of(model.config, layers))
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


def change_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A new config with some settings changed, and what follows from them, such as names of stages, derived again.

    Args:
        config: which stays as it is.
        changes: by name of a setting.

    Raises:
        ValueError: for settings that the config does not have.
    """
    unknown = [name for name in changes if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"{type(config).__name__} has no {', '.join(unknown)} to change; expected its own settings.")
    kept = {name: value for name, value in config.to_dict().items() if name not in _DERIVED}
    return type(config).from_dict(kept | dict(changes))


def add_adapter(model: PreTrainedModel, config: Any, teacher: str | os.PathLike | None = None) -> Any:
    """`model` as a peft model: its weights frozen, an adapter to train, and maybe another one that teaches.

    The adapter that is trained is `"default"`, the only one that `save_pretrained` then saves. The other is
    `"teacher"`, as in `Teacher.from_adapter(student, "teacher")`; without it the model itself may teach its adapter,
    `Teacher.from_adapter(student)`.

    Args:
        model: which peft changes in place.
        config: of the adapter, such as peft's `LoraConfig`. Needs peft (`pip install "hf-dkd[peft]"`).
        teacher: path or Hub id of the other adapter, made for the same model.

    Raises:
        ValueError: where the model has none of the modules that `config` names, or `teacher` is no adapter.
        RuntimeError: where the teacher's weights do not fit the model.
    """
    from peft import get_peft_model

    student: Any = get_peft_model(model, config)
    if teacher is not None:
        student.load_adapter(teacher, "teacher", is_trainable=False, torch_device="cpu")
        student.set_adapter("default")  # which loading froze, in peft 0.19
    student.save_pretrained = partial(student.save_pretrained, selected_adapters=["default"])
    return student


def _settings_of(config: PreTrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    """The settings that tell how many layers there are, and of what kinds, for these layers alone."""
    kinds = {name: getattr(config, name, None) for name in ("layer_types", "no_rope_layers")}
    kept: dict[str, Any] = {name: [one[layer] for layer in layers] for name, one in kinds.items() if one}
    return kept | {"num_hidden_layers": len(layers)}
