"""What to distil when there is not one hard label for every example, and other ways to divide the classes.

    accelerate launch recipes/targets.py --output_dir outputs/targets

On scikit-learn's handwritten digits, with the models of digits.py: a student for each case below and each seed, from
the same initial weights. Prints a table and writes results.json. Every option of DKDTrainingArguments applies to all.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import fail, option
from digits import METRICS, DigitsArguments, fit, load_splits, vit
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser, default_data_collator, set_seed
from transformers.utils.logging import set_verbosity_error

from hf_dkd import DataCollatorForMixup
from hf_dkd.reporting import summarise_runs, summary_table

Examples = list[dict[str, Any]]
MULTI_LABEL = {"num_labels": 4, "problem_type": "multi_label_classification"}


@dataclass
class TargetsArguments(DigitsArguments):
    output_dir: str = option("outputs/targets", "Where results.json goes.")
    labelled_share: int = option(10, "One in this many examples keeps its label, where only some have one.")
    mix_alpha: float = option(0.2, "Shares of mixed images are drawn from Beta(alpha, alpha).")
    cases: str | None = option(None, "Run these cases only, by their first words: 'dkd,mixup'.")


def few_labels(examples: Examples, every: int) -> Examples:
    """-100 marks an example without a label."""
    return [one | {"labels": one["labels"] if row % every == 0 else -100} for row, one in enumerate(examples)]


def properties(examples: Examples) -> Examples:
    """Four labels for each digit: even, five or more, prime, and with a closed loop when written."""
    rules = (lambda d: d % 2 == 0, lambda d: d >= 5, lambda d: d in (2, 3, 5, 7), lambda d: d in (0, 6, 8, 9))
    return [one | {"labels": torch.tensor([float(rule(one["labels"])) for rule in rules])} for one in examples]


def label_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    labels: Any = prediction.label_ids
    return {"accuracy": float(((logits > 0) == (labels > 0.5)).mean())}


def no_labels(examples: Examples) -> Examples:
    return [{"pixel_values": one["pixel_values"]} for one in examples]


def cases(every: int) -> dict[str, tuple[dict[str, Any], Callable[[Examples], Examples]]]:
    """By name: the settings, and what becomes of the training examples."""

    def few(examples: Examples) -> Examples:
        return few_labels(examples, every)

    alone = {"dkd_alpha": 0.0, "dkd_beta": 0.0}
    return {
        "cross-entropy": (alone, list),
        "dkd": ({}, list),
        "top-k: the teacher's 1st, 2nd to 4th, rest": ({"dkd_top_k": 4, "dkd_top_k_beta": 2.0}, list),
        "standardised logits": ({"dkd_standardize": True, "dkd_temperature": 2.0}, list),
        "mixup, cross-entropy": (alone, list),
        "mixup, dkd": ({}, list),
        "cutmix, dkd": ({}, list),
        f"1 label in {every}, cross-entropy": (alone, few),
        f"1 label in {every}, dkd where labelled": ({}, few),
        f"1 label in {every}, dkd everywhere": ({"dkd_target": "teacher"}, few),
        "no labels, dkd": ({"dkd_target": "teacher"}, no_labels),
        "multi-label, cross-entropy": (alone, properties),
        "multi-label, dkd": ({}, properties),
    }


def train_teacher(args: TargetsArguments, train: Examples, test: Examples, **options: Any) -> tuple[Any, float]:
    """A teacher and its accuracy."""
    set_seed(0)
    teacher = vit(hidden_size=64, layers=4, **(MULTI_LABEL if options else {}))
    longer = replace(args, num_train_epochs=args.teacher_epochs, learning_rate=args.teacher_learning_rate)
    return teacher, fit(longer, teacher, None, train, test, **options)[1]["eval_accuracy"]


def main() -> None:
    dataclasses: Any = TargetsArguments
    (args,) = HfArgumentParser(dataclasses).parse_args_into_dataclasses()
    set_verbosity_error()
    logging.getLogger("hf_dkd").setLevel(logging.ERROR)
    train, test = load_splits()
    of_properties = {"compute_metrics": label_accuracy}
    teacher, accuracy = train_teacher(args, train, test)
    teacher_of_properties, accuracy_of_properties = train_teacher(
        args, properties(train), properties(test), **of_properties
    )
    chosen = {
        name: case
        for name, case in cases(args.labelled_share).items()
        if args.cases is None or name.startswith(tuple(args.cases.split(",")))
    }
    if not chosen or args.seeds < 1:
        fail(f"--cases {args.cases} --seeds {args.seeds}: nothing to run; cases begin with {', '.join(cases(10))}.")
    runs: dict[str, list[dict]] = {name: [] for name in chosen}
    progress = tqdm(total=args.seeds * len(chosen), unit="run", disable=args.process_index > 0)
    for seed in range(args.seeds):
        for name, (settings, change) in chosen.items():
            progress.set_description(f"{name}, seed {seed}")
            several = name.startswith("multi-label")
            options: dict[str, Any] = of_properties if several else {}
            config: dict[str, Any] = MULTI_LABEL if several else {}
            if name.startswith(("mixup", "cutmix")):
                mixup, cutmix = (args.mix_alpha, 0.0) if name.startswith("mixup") else (0.0, args.mix_alpha)
                options = {"data_collator": DataCollatorForMixup(default_data_collator, 10, mixup, cutmix, seed)}
                config = {"problem_type": "single_label_classification"}  # shares of classes, not several labels
            set_seed(seed)
            student = vit(hidden_size=16, layers=2, **config)
            trainer, result = fit(
                replace(args, seed=seed, **settings),
                student,
                teacher_of_properties if several else teacher,
                change(train),
                properties(test) if several else test,
                **options,
            )
            runs[name].append(result)
            progress.update()
    progress.close()
    if trainer.is_world_process_zero():
        rows = {name: summarise_runs(results, METRICS) for name, results in runs.items()}
        Path(args.output_dir, "results.json").write_text(json.dumps({"table": rows, "runs": runs}, indent=2))
        print(f"\nTeachers: {100 * accuracy:.2f}, of the four labels {100 * accuracy_of_properties:.2f}")
        print(summary_table(rows, METRICS))
        print(f"\nMean ± standard deviation over {args.seeds} seeds, {len(test)} test images.")
        print("These digits are easy and the test set is small: differences of a few tenths are noise, not a ranking.")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
