"""What distillation adds to a training step, for a BERT and a ViT of sizes that a CPU manages.

    python -m benchmarks.step_time

- Trainer: a step of `transformers.Trainer` on the student alone
- Trainer + teacher: the same, with the teacher's forward under `torch.inference_mode()` before it and nothing made of
  its logits: what no distillation can do without
- DKDTrainer: a step of ours, never logged
- DKDTrainer, logged: the same, with every step logged

A step is timed from its beginning to that of the next one, so that data, clipping, optimizer and logging are in it. The
trainers take turns of a few steps each, in one process.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils.logging import set_verbosity_error

from hf_dkd import DKDTrainer

from . import measure, report

UNTIMED_STEPS = 2
TRAINER, WITH_TEACHER, OURS, LOGGED = "Trainer", "Trainer + teacher", "DKDTrainer", "DKDTrainer, logged"
Task = tuple[Any, Any, list[dict[str, Any]]]


def bert(examples: int) -> Task:
    """BERT-mini (4 layers of 256) from BERT-medium (8 of 512), 77 classes, sentences of 128 tokens."""

    def model(layers: int, hidden: int) -> Any:
        heads, between = hidden // 64, 4 * hidden
        config = BertConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=between
        )
        config.num_labels = 77
        return BertForSequenceClassification(config)

    ids = torch.randint(1_000, 30_000, (examples, 128))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 77} for row in ids]
    return model(4, 256), model(8, 512), data


def vit(examples: int) -> Task:
    """ViT-tiny (12 layers of 192) from ViT-small (12 of 384), 1,000 classes, images of 224 pixels."""

    def model(hidden: int) -> Any:
        config = ViTConfig(
            hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden, num_labels=1_000
        )
        return ViTForImageClassification(config)

    data = [{"pixel_values": torch.randn(3, 224, 224), "labels": index % 1_000} for index in range(examples)]
    return model(192), model(384), data


class TrainerWithTeacher(Trainer):
    """`Trainer` whose steps run a teacher too, and throw its logits away."""

    teacher: Any

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            self.teacher(**{name: column for name, column in inputs.items() if name != "labels"})
        return super().compute_loss(model, inputs, *args, **kwargs)


class LoggedTrainer(DKDTrainer):
    """`DKDTrainer` that adds up the seconds it spends on logging."""

    seconds_logging = 0.0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.seconds_logging += time.perf_counter() - start


class Clock(TrainerCallback):
    """The moments at which steps begin."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.moments.append(time.perf_counter())


def trainers(task: Callable[[int], Task], steps: int, batch_size: int, output_dir: str) -> dict[str, Trainer]:
    """The four of them, each with its own copy of the student and of the teacher."""
    torch.manual_seed(0)
    student, teacher, data = task(steps * batch_size)
    teacher.eval().requires_grad_(False)

    def build(trainer_class: type[Trainer], logged: bool = False, **kwargs: Any) -> Trainer:
        args = TrainingArguments(
            output_dir, max_steps=steps, per_device_train_batch_size=batch_size, save_strategy="no",
            logging_strategy="steps" if logged else "no", logging_steps=1, report_to="none", disable_tqdm=True,
            use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trainer_class(deepcopy(student), args, train_dataset=data, **kwargs)
        trainer.remove_callback(PrinterCallback)
        return trainer

    with_teacher: Any = build(TrainerWithTeacher)
    with_teacher.teacher = deepcopy(teacher)
    return {
        TRAINER: build(Trainer),
        WITH_TEACHER: with_teacher,
        OURS: build(DKDTrainer, teacher=deepcopy(teacher)),
        LOGGED: build(LoggedTrainer, logged=True, teacher=deepcopy(teacher)),
    }


def seconds_per_step(trainer: Trainer) -> float:
    """The median over the steps of one training, without the first ones."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    moments = clock.moments[UNTIMED_STEPS:]
    return measure.spread([after - before for before, after in pairwise(moments)]).median


def main() -> None:
    parser = report.options(__doc__, repeats=9)
    parser.add_argument("--steps", type=int, default=8, help=f"of each turn, {UNTIMED_STEPS} of them not timed (8)")
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    set_verbosity_error()
    logging.getLogger("hf_dkd").setLevel(logging.ERROR)

    sections, measured, goals = {}, {}, []
    for task in (bert, vit):
        with tempfile.TemporaryDirectory() as output_dir:
            turns = trainers(task, arguments.steps, arguments.batch_size, output_dir)
            times: dict[str, list[float]] = {name: [] for name in turns}
            shares = []
            for repeat in range(arguments.repeats + 1):
                for name in list(turns)[:: -1 if repeat % 2 else 1]:
                    logged: Any = turns[LOGGED]
                    logged.seconds_logging = 0.0
                    seconds = seconds_per_step(turns[name])
                    if repeat:
                        times[name].append(seconds)
                        if name == LOGGED:
                            shares.append(100 * logged.seconds_logging / arguments.steps / seconds)
        title = f"{task.__doc__} Batches of {arguments.batch_size}."
        sections[title] = report.times_table(times, [TRAINER, WITH_TEACHER])
        measured[task.__name__] = {"seconds": times, "per_cent_logging": shares}
        goals += [
            report.Goal(
                f"{task.__name__}: DKDTrainer / (Trainer + teacher)", measure.ratios(times, OURS, WITH_TEACHER), 1.03
            ),
            report.Goal(f"{task.__name__}: logging every step, % of a step", shares, 1.0),
        ]
    sections["Goals"] = report.goals_table(goals)
    report.write(arguments.output_dir, "step_time", sections, measured)


if __name__ == "__main__":
    main()
