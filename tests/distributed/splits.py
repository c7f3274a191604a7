"""Steps and evaluations on the same examples, however they are split.

A script for `accelerate launch`, and the functions that its test runs in its own process.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from hf_dkd import DKDSeq2SeqTrainer, DKDSeq2SeqTrainingArguments, DKDTrainer, DKDTrainingArguments
from hf_dkd.rows import IGNORE_INDEX, aligned_labels, logits_of
from tests import oracle
from tests.models import ARCHITECTURES

NAMES = [
    "bert", "roberta", "distilbert", "bert_tokens", "bert_mlm", "vit", "convnext", "resnet", "llama", "gpt2", "t5",
]  # fmt: skip
# With ragged labels and a blank micro-batch; with a loss that Trainer divides itself; with shifted labels.
NAMES_OF_SEVERAL_STEPS = ["bert_tokens", "convnext", "llama"]
# Other divisions of the classes, other targets: on one head of whole examples and one of ragged tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "top k": {"dkd_top_k": 3, "dkd_top_k_beta": 2.0},
    "standardised": {"dkd_standardize": True},
    "teacher's targets": {"dkd_target": "teacher"},
}
NAMES_WITH_OPTIONS = ["vit", "bert_tokens"]
PROBLEMS = ["single_label_classification", "multi_label_classification"]
SETTINGS = {"dkd_alpha": 0.7, "dkd_beta": 3.0, "dkd_temperature": 2.0, "ce_weight": 0.5}
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
LOGGED = ("loss", "ce", "tckd", "nckd", "dkd", "dkd_weight", "teacher_agreement")


def models(name: str) -> tuple[nn.Module, nn.Module]:
    student, teacher = ARCHITECTURES[name].model(seed=0), ARCHITECTURES[name].model(seed=1)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return student, teacher


def examples(name: str) -> list[dict[str, Tensor]]:
    """Eight examples; of the token heads', the third and fourth have no label: a micro-batch of two without any."""
    batch = ARCHITECTURES[name].batch()
    if batch["labels"].ndim == 2:
        batch["labels"][2:4] = IGNORE_INDEX
    return [{key: value[row] for key, value in batch.items()} for row in range(8)]


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_weights(data: list[dict[str, Tensor]], classes: int) -> list[dict[str, Tensor]]:
    """The examples with a number for each class: mixtures of two of them, or for several labels above one half."""
    shares = torch.rand(len(data), 1, generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.one_hot(torch.stack([example["labels"] for example in data]), classes).float()
    mixed = shares * labels + (1 - shares) * labels.roll(1, 0)
    return [example | {"labels": row} for example, row in zip(data, mixed, strict=True)]


def step(
    name: str, batch_size: int, accumulation: int, output_dir: str, problem: str | None = None, **options: Any
) -> dict[str, Any]:
    """Gradients of the one optimizer step over the eight examples, its log entry, and evaluations of 5, 6 and 7.

    Two processes evaluate two examples each at a time: one, two or three are left for the last batch. `problem` gives
    the examples a number for each class, as that `config.problem_type` takes it.
    """
    args = DKDTrainingArguments(
        output_dir, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=2, train_sampling_strategy="sequential", learning_rate=0.0, max_grad_norm=0.0,
        logging_steps=1, eval_with_teacher=True, **QUIET, **SETTINGS, **options,
    )  # fmt: skip
    student, teacher = models(name)
    keep = KeepGradients()
    data = examples(name)
    if problem is not None:
        student.config.problem_type = problem
        data = with_weights(data, student.config.num_labels)
        if problem == PROBLEMS[1]:
            data = [example | {"labels": (example["labels"] > 0.5).float()} for example in data]
    trainer = DKDTrainer(student, args, train_dataset=data, teacher=teacher, callbacks=[keep])
    trainer.train()
    evaluation = trainer.evaluate({str(count): data[-count:] for count in (5, 6, 7)})
    return {
        "world_size": args.world_size,
        "fused": trainer._tried.head is not None,
        "gradients": keep.gradients,
        "logs": _logs(trainer),
        "evaluation": _without_timing(evaluation),
    }


def step_without_teacher(name: str, batch_size: int, accumulation: int, output_dir: str) -> dict[str, Any]:
    """Gradients of the one optimizer step over the eight examples on the hard labels alone."""
    args = DKDTrainingArguments(
        output_dir, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential", learning_rate=0.0, max_grad_norm=0.0, **QUIET,
    )  # fmt: skip
    keep = KeepGradients()
    DKDTrainer(models(name)[0], args, train_dataset=examples(name), callbacks=[keep]).train()
    return {"world_size": args.world_size, "gradients": keep.gradients}


def several_steps(name: str, batch_size: int, output_dir: str) -> dict[str, Any]:
    """Three epochs of two steps, the second over what is left of the accumulation, and two log entries."""
    args = DKDTrainingArguments(
        output_dir, num_train_epochs=3, per_device_train_batch_size=batch_size, gradient_accumulation_steps=3,
        train_sampling_strategy="sequential", optim="sgd", learning_rate=0.1, logging_steps=3, dkd_warmup_steps=5,
        **QUIET, **SETTINGS,
    )  # fmt: skip
    student, teacher = models(name)
    trainer = DKDTrainer(student, args, train_dataset=examples(name), teacher=teacher)
    trainer.train()
    return {
        "world_size": args.world_size,
        "steps": trainer.state.global_step,
        "logs": _logs(trainer),
        "weights": {key: parameter.detach() for key, parameter in student.named_parameters()},
    }


def generation(output_dir: str) -> dict[str, Any]:
    """What `DKDSeq2SeqTrainer` finds for seven examples: metrics, generated tokens and labels."""
    args = DKDSeq2SeqTrainingArguments(
        output_dir, per_device_eval_batch_size=2, predict_with_generate=True, generation_max_length=12,
        eval_with_teacher=True, **QUIET, **SETTINGS,
    )  # fmt: skip
    # With this seed no two examples generate the same tokens.
    student, teacher = ARCHITECTURES["t5"].model(seed=2), ARCHITECTURES["t5"].model(seed=1)
    trainer = DKDSeq2SeqTrainer(student, args, teacher=teacher)
    output = trainer.predict(examples("t5")[1:])
    return {
        "world_size": args.world_size,
        "metrics": _without_timing(output.metrics),
        "generated": torch.tensor(output.predictions),
        "labels": torch.tensor(output.label_ids),
    }


def _logs(trainer: DKDTrainer) -> list[dict[str, float]]:
    return [{key: entry[key] for key in ("step", *LOGGED)} for entry in trainer.state.log_history if "dkd" in entry]


def _without_timing(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith(("_time", "_runtime", "_per_second"))}


def expected(name: str, distils: bool = True) -> dict[str, Tensor]:
    """The gradient by autograd of the oracle over all eight examples at once; of the hard labels alone if asked."""
    student, teacher = models(name)
    student.train()
    teacher.eval()
    data = examples(name)
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    head = ARCHITECTURES[name].head
    labels = aligned_labels(head, batch)
    student_rows = logits_of(student(**batch), "student")[labels != IGNORE_INDEX]
    with torch.no_grad():
        teacher_rows = logits_of(teacher(**batch), "teacher")[labels != IGNORE_INDEX]
    labels = labels[labels != IGNORE_INDEX]
    dkd = oracle.dkd(
        student_rows.double(), teacher_rows.double(), labels,
        SETTINGS["dkd_alpha"], SETTINGS["dkd_beta"], SETTINGS["dkd_temperature"],
    )  # fmt: skip
    hard = cross_entropy(student_rows.double(), labels)
    (SETTINGS["ce_weight"] * hard + dkd.mean() if distils else hard).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def main() -> None:
    output = Path(sys.argv[1])
    results: dict[Any, Any] = {
        ("step", name, *split): step(name, *split, str(output)) for name in NAMES for split in ((4, 1), (2, 2))
    }
    results |= {
        ("without teacher", name, *split): step_without_teacher(name, *split, str(output))
        for name in NAMES
        for split in ((4, 1), (2, 2))
    }
    results |= {("several steps", name): several_steps(name, 1, str(output)) for name in NAMES_OF_SEVERAL_STEPS}
    results |= {
        (option, name): step(name, 2, 2, str(output), **settings)
        for option, settings in OPTIONS.items()
        for name in NAMES_WITH_OPTIONS
    }
    results |= {problem: step("vit", 2, 2, str(output), problem) for problem in PROBLEMS}
    results["generation"] = generation(str(output))
    if all(result["world_size"] == 2 for result in results.values()) and int(torch.distributed.get_rank()) == 0:
        torch.save(results, output / "results.pt")
    torch.distributed.barrier()
    # All is saved. An interpreter was seen to abort as it ended, though its process group was destroyed, much like
    # https://github.com/pytorch/pytorch/pull/179291 tells of: leave without ending it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
