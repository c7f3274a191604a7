"""Telling one teacher from another by its weights and its config."""

import hashlib
import json
from typing import Any

import torch

from .heads import bare_model
from .teacher import Teacher

# What the config says of where it came from, and not of what the model computes.
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")


def teacher_fingerprint(teacher: Teacher) -> str:
    """A hash of the teacher's config, and of its weights one after the other, on whatever device they are.

    Of a model with adapters, those count that the teacher runs with.
    """
    model: Any = teacher.model
    digest = hashlib.blake2b(digest_size=16)
    config: Any = getattr(bare_model(model), "config", None)
    settings = {} if config is None else config.to_dict()
    kept = {name: value for name, value in settings.items() if name not in _NOT_OF_THE_MODEL}
    digest.update(type(bare_model(model)).__name__.encode())
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    unused = _unused_adapters(teacher)
    for name, weight in sorted(model.state_dict().items()):
        if isinstance(weight, torch.Tensor) and not unused & set(name.split(".")):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            data = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()


def _unused_adapters(teacher: Teacher) -> set[str]:
    model: Any = teacher.model
    known = set(getattr(model, "peft_config", {}))
    if not known or teacher.adapter is not None:
        return known - {teacher.adapter}
    return known if teacher.shares_student else known - set(model.base_model.active_adapters)
