"""Distil a small ViT from a larger one on scikit-learn's handwritten digits: CE alone, classical KD and DKD compared.

    accelerate launch recipes/digits.py --output_dir outputs/digits

Trains the teacher once, then for each seed the same student from the same initial weights and in the same batch order
with each method. Prints a table and writes results.json, curves.png and the last DKD student to the output directory.
Every option of DKDTrainingArguments applies to the students: try --dkd_beta 4 or --dkd_temperature 2.
"""

import json
import logging
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import fail, option
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
from hf_dkd.reporting import plot_curves, summarise_runs, summary_table

METHODS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"dkd_alpha": 0.0, "dkd_beta": 0.0},
    "classical KD": {"distillation": "kd", "dkd_beta": 1.0},
    "DKD": {},
}
METRICS = {"accuracy": "test accuracy %", "teacher_agreement": "agreement %"}


@dataclass
class DigitsArguments(DKDTrainingArguments):
    seeds: int = option(3, "Students per method, with seeds 0, 1, …")
    teacher_epochs: float = option(25, "Epochs for the teacher.")
    teacher_learning_rate: float = option(2e-3, "Learning rate for the teacher.")
    output_dir: str = option("outputs/digits", "Where results and the student go.")
    num_train_epochs: float = option(24, "Epochs for each student.")
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 512
    dkd_beta: float = option(2.0, "Weight of NCKD.")
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True
    dataloader_pin_memory: bool = False
    eval_with_teacher: bool = True


def vit(hidden_size: int, layers: int, **other: Any) -> ViTForImageClassification:
    size: dict[str, Any] = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_labels": 10}
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_attention_heads=4, num_hidden_layers=layers, **size | other
    )
    return ViTForImageClassification(config)


def load_splits() -> list[list[dict]]:
    """Half of the 1,797 images for training, half held out."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 → -1..1
    images = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, digits.target, strict=True)]
    return train_test_split(images, test_size=0.5, stratify=digits.target, random_state=0)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def fit(
    args: DigitsArguments, model: Any, teacher: Any, train: Any, test: Any, **options: Any
) -> tuple[DKDTrainer, dict]:
    given = {"compute_metrics": accuracy, "teacher": teacher} | options
    trainer = DKDTrainer(model, args, train_dataset=train, eval_dataset=test, **given)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return trainer, {"parameters": model.num_parameters(), "seconds": seconds, **trainer.evaluate()}


def main() -> None:
    dataclasses: Any = DigitsArguments
    (args,) = HfArgumentParser(dataclasses).parse_args_into_dataclasses()
    if args.seeds < 1:
        fail(f"--seeds is {args.seeds}; expected 1 or more.")
    set_verbosity_error()
    logging.getLogger("hf_dkd").setLevel(logging.ERROR)
    train, test = load_splits()
    progress = tqdm(total=1 + args.seeds * len(METHODS), desc="teacher", unit="run", disable=args.process_index > 0)

    set_seed(0)
    teacher = vit(hidden_size=64, layers=4)
    teacher_args = replace(args, num_train_epochs=args.teacher_epochs, learning_rate=args.teacher_learning_rate)
    runs = {"teacher": [fit(teacher_args, teacher, None, train, test)[1]]} | {name: [] for name in METHODS}
    progress.update()
    histories: dict[str, list] = {name: [] for name in METHODS}
    for seed in range(args.seeds):
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
        rows = {name: summarise_runs(results, METRICS) for name, results in runs.items()}
        output = Path(args.output_dir)
        trainer.save_model()
        trainer.create_model_card()
        plot_curves(histories, output / "curves.png")
        versions = {name: version(name) for name in ("hf-dkd", "torch", "transformers", "accelerate", "datasets")}
        results = {
            "table": rows,
            "runs": runs,
            "histories": histories,
            "settings": args.to_dict(),
            "versions": versions,
        }
        (output / "results.json").write_text(json.dumps(results, indent=2))
        print(f"\n{summary_table(rows, METRICS)}\n")
        print(f"Mean ± standard deviation over {args.seeds} seeds, {len(test)} test images.")
        print("These digits are easy and the test set is small: differences of a few tenths are noise, not a ranking.")
        print(f"Wrote results.json, curves.png and the last DKD student to {output}.")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
