"""One optimizer step, and one evaluation, of every architecture on the same examples, however they are split.

A script for `accelerate launch`, and the functions that its test runs in its own process.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from hf_dkd import DKDTrainer, DKDTrainingArguments
from hf_dkd.rows import IGNORE_INDEX, aligned_labels, labelled_rows, logits_of
from tests import oracle
from tests.models import ARCHITECTURES

NAMES = [
    "bert", "roberta", "distilbert", "bert_tokens", "bert_mlm", "vit", "convnext", "resnet", "llama", "gpt2", "t5",
]  # fmt: skip
SETTINGS = {"dkd_alpha": 0.7, "dkd_beta": 3.0, "dkd_temperature": 2.0, "ce_weight": 0.5}
LOGGED = ("loss", "ce", "tckd", "nckd", "dkd", "teacher_agreement")


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


def step(name: str, batch_size: int, accumulation: int, output_dir: str) -> dict[str, Any]:
    """Gradients of the one optimizer step over the eight examples, its log entry, and an evaluation of seven."""
    args = DKDTrainingArguments(
        output_dir, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=2, train_sampling_strategy="sequential", learning_rate=0.0, max_grad_norm=0.0,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        eval_with_teacher=True, **SETTINGS,
    )  # fmt: skip
    student, teacher = models(name)
    keep = KeepGradients()
    data = examples(name)
    trainer = DKDTrainer(student, args, train_dataset=data, eval_dataset=data[1:], teacher=teacher, callbacks=[keep])
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "dkd" in entry)
    evaluation = trainer.evaluate()
    return {
        "world_size": args.world_size,
        "gradients": keep.gradients,
        "logs": {key: logs[key] for key in LOGGED},
        "evaluation": {
            key: v
            for key, v in evaluation.items()
            if key.startswith(("eval_loss", "eval_tckd", "eval_nckd", "eval_teacher"))
        },
    }


def expected(name: str) -> dict[str, Tensor]:
    """The gradient by autograd of the oracle over all eight examples at once."""
    student, teacher = models(name)
    student.train()
    teacher.eval()
    data = examples(name)
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    head = ARCHITECTURES[name].head
    labels = aligned_labels(head, batch)
    student_rows = labelled_rows(logits_of(student(**batch), "student"), labels, "student")
    with torch.no_grad():
        teacher_rows = labelled_rows(logits_of(teacher(**batch), "teacher"), labels, "teacher")
    labels = labels[labels != IGNORE_INDEX]
    dkd = oracle.dkd(
        student_rows.double(), teacher_rows.double(), labels,
        SETTINGS["dkd_alpha"], SETTINGS["dkd_beta"], SETTINGS["dkd_temperature"],
    )  # fmt: skip
    (SETTINGS["ce_weight"] * cross_entropy(student_rows.double(), labels) + dkd.mean()).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def main() -> None:
    output = Path(sys.argv[1])
    results = {(name, split): step(name, *split, str(output)) for name in NAMES for split in ((4, 1), (2, 2))}
    if all(result["world_size"] == 2 for result in results.values()) and int(torch.distributed.get_rank()) == 0:
        torch.save(results, output / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
