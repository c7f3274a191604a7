"""Tiny models, examples and arguments for the tests of the trainers, and what the oracle expects of their logs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_dkd import DKDTrainer, DKDTrainingArguments

from . import oracle

_TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}
_WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TEXT = {"vocab_size": 64, "max_position_embeddings": 32}
_CONFIGS: dict[str, dict[str, Any]] = {
    "vit": _TRANSFORMER | _WITHOUT_DROPOUT | {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 4},
    "bert": _TRANSFORMER | _WITHOUT_DROPOUT | _TEXT | {"num_labels": 4},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.3, "num_labels": 4}
    | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    | _TEXT,
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1},
    "mixtral": _TRANSFORMER | _TEXT | {"num_key_value_heads": 2, "num_local_experts": 4},
    "t5": {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    | {"decoder_start_token_id": 0},
}


def tiny(model_class: type[PreTrainedModel], seed: int = 0, **config: Any) -> Any:
    """A two-layer model of `model_class` without dropout, whose random weights are large enough to disagree."""
    set_seed(seed)
    return model_class(model_class.config_class(**{**_CONFIGS[model_class.config_class.model_type], **config}))


def vits() -> tuple[Any, Any]:
    """A student and a teacher for `images`."""
    return tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)


def images(count: int, size: int = 8, classes: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Random images (1, size, size) with a label each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator).tolist()
    return [{"pixel_values": torch.randn(1, size, size, generator=generator), "labels": label} for label in labels]


def sentences(count: int, length: int = 6, classes: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Random token ids with a label each."""
    ids = torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row.sum()) % classes} for row in ids
    ]


def tagged(labelled: list[int], length: int = 6, classes: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Random token ids; the first `labelled[i]` tokens of example i have a label, the others -100."""
    examples = sentences(len(labelled), length, seed=seed)
    for example, count in zip(examples, labelled, strict=True):
        labels = example["input_ids"] % classes
        example["labels"] = labels.masked_fill(torch.arange(length) >= count, -100)
    return examples


def arguments(path: Path, arguments_class: type = DKDTrainingArguments, **settings: Any) -> Any:
    """One step of plain SGD over four examples in order, every step logged, unless `settings` say otherwise."""
    defaults: dict[str, Any] = {
        "output_dir": str(path),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    return arguments_class(**{**defaults, **settings})


def logs_of(trainer: Any) -> list[dict[str, float]]:
    """What `trainer` logged while training, without evaluations and the summary at the end."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trained(path: Path, student: nn.Module, examples: Any, teacher: Any = None, **settings: Any) -> DKDTrainer:
    """A `DKDTrainer` that has trained `student` on `examples`."""
    trainer = DKDTrainer(student, arguments(path, **settings), train_dataset=examples, teacher=teacher)
    trainer.train()
    return trainer


def forwards(module: nn.Module) -> list[dict[str, Any]]:
    """A list to which every later forward of `module` adds its keyword arguments."""
    calls: list[dict[str, Any]] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def weights_of(model: nn.Module) -> Tensor:
    """All parameters of `model` in one vector, copied."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class PutsInTrainMode(TrainerCallback):
    """A script that puts `module` in train mode before every step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.module.train()


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step, all parameters in one vector."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parameters = list(model.parameters())
        self.steps.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        )


def first_gradient(trainer: Any) -> Tensor:
    """Train, and return the gradient of the first optimizer step."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """|actual − expected| ≤ tolerance·|expected|, as vectors. NaN fails."""
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"the relative error is {error:.2e}"


def labelled_logits(model: nn.Module, examples: list[dict[str, Any]], **columns: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 logits of `model` at the labelled rows of `examples`, and their labels."""
    batch = {**default_data_collator(examples), **columns}
    kept = batch["labels"] != -100
    return model(**batch).logits[kept].double(), batch["labels"][kept]


def expected_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 1.0, temperature: float = 1.0
) -> dict[str, float]:
    """What a step over these rows logs at w = 1 and ce_weight 1, by the oracle."""
    tckd, nckd, _, _ = oracle.divergences(student, teacher, labels, temperature)
    ce = cross_entropy(student, labels)
    dkd = oracle.dkd(student, teacher, labels, alpha, beta, temperature).mean()
    agreement = (student.argmax(1) == teacher.argmax(1)).double().mean()
    terms = {"loss": ce + dkd, "ce": ce, "dkd": dkd, "tckd": tckd.mean(), "nckd": nckd.mean()}
    return {name: value.item() for name, value in (terms | {"teacher_agreement": agreement}).items()}


def expected_logs(
    student: nn.Module, teacher: nn.Module, examples: list[dict[str, Any]], **settings: float
) -> dict[str, float]:
    """What a step over `examples` logs, by the oracle: see `expected_terms`."""
    with torch.no_grad():
        logits, labels = labelled_logits(student, examples)
        return expected_terms(logits, labelled_logits(teacher, examples)[0], labels, **settings)


def in_rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples of a batch, such as those of `models.ARCHITECTURES`."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def without_labels(examples: list[dict[str, Any]], names: tuple[str, ...] = ("labels",)) -> list[dict[str, Any]]:
    return [{key: value for key, value in example.items() if key not in names} for example in examples]


def all_logits(model: Any, examples: list[dict[str, Any]]) -> Tensor:
    """The float64 logits of every row of `examples`, (R, C)."""
    return model(**default_data_collator(without_labels(examples))).logits.double().flatten(0, -2)
