"""Distil a small ViT from a larger one on scikit-learn's handwritten digits: CE alone, classical KD and DKD compared.

    accelerate launch recipes/digits.py --output_dir outputs/digits

Trains the teacher once, then for each seed the same student from the same initial weights and in the same batch order
with each method. Prints a table and writes results.json, curves.png and the last DKD student to the output directory.
Every option of DKDTrainingArguments applies to the students: try --dkd_beta 4 or --dkd_temperature 2.
"""

import json
import logging
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    PrinterCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils.logging import set_verbosity_error

from hf_dkd import DKDTrainer, DKDTrainingArguments
from hf_dkd.reporting import plot_curves

METHODS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"dkd_alpha": 0.0, "dkd_beta": 0.0},
    "classical KD": {"distillation": "kd", "dkd_beta": 1.0},
    "DKD": {},
}


@dataclass
class DigitsArguments:
    seeds: int = field(default=3, metadata={"help": "Students per method, with seeds 0, 1, …"})
    test_share: float = field(default=0.5, metadata={"help": "Share of the 1,797 images held out for testing."})
    teacher_epochs: float = field(default=25, metadata={"help": "Epochs for the teacher."})
    teacher_learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate for the teacher."})


@dataclass
class DigitsTrainingArguments(DKDTrainingArguments):
    output_dir: str = field(default="outputs/digits", metadata={"help": "Where results and the student go."})
    num_train_epochs: float = field(default=24, metadata={"help": "Epochs for each student."})
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 512
    dkd_beta: float = field(default=2.0, metadata={"help": "Weight of NCKD."})
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True
    dataloader_pin_memory: bool = False
    eval_with_teacher: bool = True


def vit(hidden_size: int, layers: int) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    return ViTForImageClassification(config)


def load_splits(test_share: float) -> tuple[list[dict], list[dict]]:
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 → -1..1
    train, test = train_test_split(range(len(pixels)), test_size=test_share, stratify=digits.target, random_state=0)
    images = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, digits.target, strict=True)]
    return [images[row] for row in train], [images[row] for row in test]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def fit(
    args: DKDTrainingArguments,
    model: ViTForImageClassification,
    teacher: ViTForImageClassification | None,
    train: Any,
    test: Any,
) -> tuple[DKDTrainer, dict]:
    trainer = DKDTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, teacher=teacher)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return trainer, {"seconds": time.perf_counter() - start, **trainer.evaluate()}


def summarise(runs: list[dict], parameters: int) -> dict[str, float]:
    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    row: dict[str, float] = {"parameters": parameters, "seconds": statistics.mean(run["seconds"] for run in runs)}
    for name in ("accuracy", "teacher_agreement"):
        values = [100 * run[f"eval_{name}"] for run in runs if f"eval_{name}" in run]
        if values:
            row |= {name: statistics.mean(values), f"{name}_spread": spread(values)}
    return row


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':<14} {'test accuracy %':>16} {'agreement %':>14} {'parameters':>11} {'seconds':>8}"]
    for name, row in rows.items():
        agreement = (
            f"{row['teacher_agreement']:.2f} ± {row['teacher_agreement_spread']:.2f}" if name != "teacher" else ""
        )
        score = (
            f"{row['accuracy']:.2f} ± {row['accuracy_spread']:.2f}" if name != "teacher" else f"{row['accuracy']:.2f}"
        )
        lines.append(f"{name:<14} {score:>16} {agreement:>14} {row['parameters']:>11,} {row['seconds']:>8.1f}")
    return "\n".join(lines)


def main() -> None:
    dataclasses: Any = (DigitsArguments, DigitsTrainingArguments)
    options, args = HfArgumentParser(dataclasses).parse_args_into_dataclasses()
    set_verbosity_error()
    logging.getLogger("hf_dkd").setLevel(logging.ERROR)
    train, test = load_splits(options.test_share)
    progress = tqdm(total=1 + options.seeds * len(METHODS), desc="teacher", unit="run", disable=args.process_index > 0)

    set_seed(0)
    teacher = vit(hidden_size=64, layers=4)
    teacher_args = replace(args, num_train_epochs=options.teacher_epochs, learning_rate=options.teacher_learning_rate)
    _, result = fit(teacher_args, teacher, None, train, test)
    rows = {"teacher": summarise([result], teacher.num_parameters())}
    progress.update()

    runs: dict[str, list[dict]] = {name: [] for name in METHODS}
    histories: dict[str, list] = {name: [] for name in METHODS}
    for seed in range(options.seeds):
        for name, settings in METHODS.items():
            progress.set_description(f"{name}, seed {seed}")
            set_seed(seed)
            student = vit(hidden_size=16, layers=2)
            trainer, result = fit(replace(args, seed=seed, **settings), student, teacher, train, test)
            runs[name].append(result)
            histories[name].append(trainer.state.log_history)
            progress.update()
    progress.close()

    if trainer.is_world_process_zero():
        rows |= {name: summarise(runs[name], student.num_parameters()) for name in METHODS}
        output = Path(args.output_dir)
        trainer.save_model()
        trainer.create_model_card()
        plot_curves(histories, output / "curves.png")
        versions = {name: version(name) for name in ("hf-dkd", "torch", "transformers", "accelerate", "datasets")}
        settings = {"alpha": args.dkd_alpha, "beta": args.dkd_beta, "temperature": args.dkd_temperature}
        results = {"table": rows, "runs": runs, "settings": settings | asdict(options), "versions": versions}
        (output / "results.json").write_text(json.dumps(results, indent=2))
        print(f"\n{table(rows)}\n")
        print(f"Mean ± standard deviation over {options.seeds} seeds, {len(test)} test images.")
        print("These digits are easy and the test set is small: differences of a few tenths are noise, not a ranking.")
        print(f"Wrote results.json, curves.png and the last DKD student to {output}.")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
