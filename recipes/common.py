"""What the recipes share: options, splits, the student, the tokenizer, and the run with its results."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

import datasets
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Value
from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.trainer_utils import PredictionOutput

from hf_dkd.cache_format import manifest_of, without_teacher_inputs
from hf_dkd.command_line import parse as parse  # for the recipes
from hf_dkd.metrics import class_columns
from hf_dkd.splits import hold_out
from hf_dkd.student import change_config, keep_layers
from hf_dkd.time_limit import last_checkpoint

PACKAGES = ("hf-dkd", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "numpy")


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text, **metadata})


def fail(message: str) -> NoReturn:
    """Stop with one line, printed by one process."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    raise SystemExit(f"{Path(sys.argv[0]).name}: error: {message}" if first else 2)


@dataclass
class DataArguments:
    """Where the data comes from; each recipe adds its columns."""

    dataset_name: str | None = option(None, "Hub id, folder of data or images, or what cache_teacher.py wrote.")
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_file: str | None = option(None, "Parquet, CSV or JSON file, instead of a name.")
    validation_file: str | None = option(None, "The same for validation.")
    test_file: str | None = option(None, "The same for testing.")
    validation_share: float | None = option(0.1, "Share of the training set held out, if no split is for validation.")
    split_seed: int = option(0, "Seed of that split; --seed does not move it.")
    max_train_samples: int | None = option(None, "Use the first ones only.")
    max_eval_samples: int | None = option(None, "The same for validation and test.")
    evaluate_on_test: bool = option(True, "False leaves the test split untouched, as for tuning.")
    config: str | None = option(None, "YAML or JSON file of these options; the command line wins over it.")


@dataclass
class StudentArguments:
    """Which model is trained."""

    student_model_name_or_path: str | None = option(None, "Hub id or folder of the student.")
    student_model_type: str | None = option(None, "Model type, such as 'vit', for a student without any checkpoint.")
    student_config_overrides: str | None = option(
        None, "Start from random weights with these changes to the config: 'hidden_size=192,…'."
    )
    student_layers: str | None = option(
        None, "Keep these layers of the checkpoint (by default the teacher's), counted from 0: '0,3,5'."
    )


@contextmanager
def loading(what: str, name: str | None, remedy: str | None = None) -> Iterator[None]:
    """Turn what goes wrong while loading, here or from the Hub, into one sentence that names the local options."""
    try:
        yield
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and not Path(name or "").exists()
        place = "no such local path, and the Hub has it not or cannot be reached: " if missing else ""
        remedy = remedy or f"give a folder with --{what.split()[0]}_model_name_or_path FOLDER"
        fail(f"cannot load the {what} {name!r}: {place}{' '.join(str(error).split())[:400]}; {remedy}.")


def load_splits(data: DataArguments) -> DatasetDict:
    """The splits train, validation and, where there is one and it may be touched, test."""
    given = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    files = {split: file for split, file in given.items() if file is not None}
    if files and "train" not in files:
        fail(f"{', '.join(files)} file without a train_file: give --train_file too.")
    if not files and data.dataset_name is None:
        fail("no data: give --dataset_name (a Hub id or a folder) or --train_file.")
    remedy = "give a folder with --dataset_name FOLDER or files with --train_file FILE"
    with loading("data set", str(files or data.dataset_name), remedy):
        if files:
            suffix = Path(files["train"]).suffix.removeprefix(".")
            loaded = datasets.load_dataset({"jsonl": "json", "txt": "text"}.get(suffix, suffix), data_files=files)
        elif data.dataset_name and Path(data.dataset_name, "dataset_dict.json").exists():
            loaded = without_teacher_inputs(datasets.load_from_disk(data.dataset_name))
        else:
            loaded = datasets.load_dataset(data.dataset_name, data.dataset_config_name)
    first = "train" if "train" in loaded else next(iter(loaded))
    splits = DatasetDict(train=loaded.pop(first))
    for name, split in reversed(loaded.items()):  # MNLI has two of each: the first one wins
        if name.startswith(("valid", "dev")):
            splits["validation"] = split
        elif name.startswith("test") and data.evaluate_on_test:
            splits["test"] = split
    if "validation" not in splits and data.validation_share is not None:
        splits |= hold_out(splits["train"], data.validation_share, data.split_seed)
    for name, split in splits.items():
        most = data.max_train_samples if name == "train" else data.max_eval_samples
        splits[name] = split.select(range(min(most or len(split), len(split))))
    return splits


def column(splits: DatasetDict, asked: str | None, usual: Sequence[str], option: str) -> str:
    """The column that the user named, or else the first usual one that is there."""
    columns = splits["train"].column_names
    found = [name for name in ([asked] if asked else usual) if name in columns]
    if not found:
        wanted = f"no column {asked!r}" if asked else f"none of the columns {', '.join(usual)}"
        fail(f"the data has {wanted}; its columns are {', '.join(columns)}: name one with --{option}.")
    return found[0]


def select_columns(splits: DatasetDict, data: DataArguments, usual: Mapping[str, Sequence[str]]) -> DatasetDict:
    """Splits of the columns that `usual` names: each the one of option NAME_column_name, or a usual one, renamed."""
    if manifest_of(splits["train"]):
        return splits  # cache_teacher.py chose them
    options = {name: f"{name}_column_name" for name in usual}
    columns = {column(splits, getattr(data, options[name]), usual[name], options[name]): name for name in usual}
    return splits.select_columns(list(columns)).rename_columns(columns)


def with_class_labels(splits: DatasetDict, name: str) -> tuple[DatasetDict, list[str]]:
    """Splits whose column `name` numbers the classes alike, and their names. Unlabelled splits (-1) are left out."""
    feature = splits["train"].features[name]
    if isinstance(feature, ClassLabel):
        return DatasetDict({key: split for key, split in splits.items() if max(split[name]) >= 0}), feature.names
    if str(getattr(feature, "dtype", "")).startswith("float"):
        fail(f"the label column {name!r} holds {feature.dtype}, as for regression; distilling takes classes.")
    names = [str(value) for value in sorted(splits["train"].unique(name))]
    try:
        return splits.cast_column(name, Value("string")).cast_column(name, ClassLabel(names=names)), names
    except ValueError as error:
        fail(f"the label column {name!r}: {error}; the training split must have every label.")


def load_student(
    auto_class: Any, options: StudentArguments, teacher: str | None = None, names: Sequence[str] | None = None
) -> Any:
    """The model to train: a checkpoint, some layers of one, or random weights by a config with overrides.

    `names` are those of the classes, `teacher` the default of where its layers come from.
    """
    labels: dict[str, Any] = {}
    if names is not None:
        labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
        labels["label2id"] = {name: index for index, name in enumerate(names)}
    path = options.student_model_name_or_path or (teacher if options.student_layers else None)
    if path is None and options.student_model_type is None:
        fail("no student: give --student_model_name_or_path (a Hub id or a folder), or --student_model_type.")
    with loading("student", path or options.student_model_type):
        make: Any = AutoConfig.for_model if path is None else AutoConfig.from_pretrained
        config = make(path or options.student_model_type, **labels)
        if path is None or options.student_config_overrides:
            overrides = re.sub(r"(\w+)=", r"\1: ", options.student_config_overrides or "")
            return auto_class.from_config(change_config(config, yaml.safe_load(f"{{{overrides}}}")))
        model = auto_class.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
        layers = options.student_layers
        return model if layers is None else keep_layers(model, [int(layer) for layer in layers.split(",")])


def load_tokenizer(path: str | None, whose: str, **options: Any) -> Any:
    """The tokenizer of the student or the teacher, saved at `path`."""
    if path is None:
        fail(f"no {whose}: give --{whose}_model_name_or_path, whose tokenizer splits the texts.")
    with loading(f"{whose} tokenizer", path):
        return AutoTokenizer.from_pretrained(path, **options)


def load_shared_tokenizer(student: str | None, teacher: str | None) -> Any:
    """The student's tokenizer, or else the teacher's, which must be the same: both models read the same ids."""
    tokenizer = load_tokenizer(student or teacher, "student")
    if teacher and load_tokenizer(teacher, "teacher").get_vocab() != tokenizer.get_vocab():
        fail(f"the teacher {teacher!r} has another tokenizer than the student: take two models of one family.")
    return tokenizer


def run(
    trainer: Any,
    splits: DatasetDict,
    settings: dict[str, Any],
    primary: str,
    table: Callable[[PredictionOutput], dict[str, Any]] = class_columns,
    higher_is_better: bool = True,
    teacher_logits: bool = True,
    **card: Any,
) -> None:
    """Train, evaluate, and save the model, its card, results.json and predictions.parquet.

    `settings`, the options that are not defaults, repeat the run as a `--config` file. `primary` is the metric by which
    runs are compared, `table` makes the columns of predictions.parquet, `teacher_logits` is whether the metrics see the
    teacher's, `card` goes to `Trainer.create_model_card`.
    """
    args = trainer.args
    if args.teacher_model_name_or_path:  # a default of the recipe too, which figures.py loads
        settings["teacher_model_name_or_path"] = args.teacher_model_name_or_path
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = last_checkpoint(args.output_dir)
    set_seed(args.seed)  # whatever was loaded before, the same order of batches and the same dropout
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    trainer.save_model()
    trainer.save_state()

    if trainer.teacher is not None:
        args.eval_with_teacher = True
        args.include_for_metrics = [*args.include_for_metrics, *(["teacher_logits"] if teacher_logits else [])]
    metrics: dict[str, dict[str, float]] = {}
    for name in ("validation", "test"):
        if name in splits:
            output = trainer.predict(splits[name], metric_key_prefix=name)
            metrics[name] = {key.removeprefix(f"{name}_"): value for key, value in output.metrics.items()}
            trainer.log_metrics(name, output.metrics)
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        Dataset.from_dict(table(output)).to_parquet(folder / "predictions.parquet")
        results = {
            "recipe": Path(sys.argv[0]).name,
            "primary_metric": primary,
            "higher_is_better": higher_is_better,
            "metrics": metrics,
            "training_seconds": round(seconds, 2),
            "resumed_from": resume,
            "processes": args.world_size,
            "parameters": trainer.model.num_parameters(),
            "settings": settings,
            "versions": {one.name: one.version for one in distributions() if one.name in PACKAGES},
        }
        (folder / "results.json").write_text(json.dumps(results, indent=2, default=str), encoding="utf-8")
    (trainer.push_to_hub if args.push_to_hub else trainer.create_model_card)(**card)
    if trainer.is_world_process_zero():
        print(f"Wrote the model, results.json and predictions.parquet to {args.output_dir}.", flush=True)
    trainer.accelerator.wait_for_everyone()  # a process that is done must not end those that still write
    trainer.accelerator.end_training()
