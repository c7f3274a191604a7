"""What the recipes share: options, loading with clear errors, splits, the student, the final evaluation and results."""

import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

import datasets
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Value
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, set_seed
from transformers.trainer_utils import PredictionOutput, get_last_checkpoint

from hf_dkd.student import keep_layers

PACKAGES = ("hf-dkd", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "numpy")


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class DataArguments:
    """Where the data comes from; each recipe adds its columns."""

    dataset_name: str | None = option(None, "Hub id, or a folder of parquet, CSV, JSON or image files.")
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_file: str | None = option(None, "Parquet, CSV or JSON file, instead of a name.")
    validation_file: str | None = option(None, "The same for validation.")
    test_file: str | None = option(None, "The same for testing.")
    validation_share: float = option(0.1, "Share of the training set held out, where there is no validation split.")
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


def fail(message: str) -> NoReturn:
    """Stop with one line, printed by one process."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    raise SystemExit(f"{Path(sys.argv[0]).name}: error: {message}" if first else 2)


@contextmanager
def loading(what: str, name: str | None, remedy: str) -> Iterator[None]:
    """Turn a failure to find files, here or on the Hub, into one sentence that names the local options."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"cannot load the {what} {name!r}: no such local path, and the Hub has it not or cannot be reached "
             f"({reason}); {remedy}.")  # fmt: skip


def parse(*dataclasses: Any) -> tuple[Any, ...]:
    """The dataclasses filled from the command line and the `--config` file, then a dict of what is not a default."""
    parser = HfArgumentParser(dataclasses, usage="%(prog)s [--config FILE] [--OPTION VALUE …]; --help lists them")
    defaults = vars(parser.parse_args([]))
    config = parser.parse_known_args()[0].config
    if config is not None:
        parser.set_defaults(**_read_config(config, defaults, parser.error))
    values = vars(parser.parse_args())
    try:
        filled = parser.parse_dict(dict(values))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    changed = {name: value for name, value in values.items() if value != defaults[name] and name != "config"}
    return (*filled, changed)


def _read_config(path: str, known: dict[str, Any], error: Callable[[str], NoReturn]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as problem:
        error(f"cannot read --config {path}: {' '.join(str(problem).split())}")
    if not isinstance(content, dict):
        error(f"--config {path} holds a {type(content).__name__}; expected options and their values")
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            error(f"--config {path}: no option is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    # As strings the command line's own types apply: YAML reads 1e-3 as a string, and 5 where a float is meant.
    plain = (str, int, float, bool)
    return {name: str(value) if isinstance(value, plain) else value for name, value in content.items()}


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
        else:
            loaded = datasets.load_dataset(data.dataset_name, data.dataset_config_name)
    splits = DatasetDict(train=loaded.get("train", next(iter(loaded.values()))))
    for name, split in reversed(loaded.items()):  # MNLI has two of each: the first one wins
        if name.startswith(("valid", "dev")):
            splits["validation"] = split
        elif name.startswith("test") and data.evaluate_on_test:
            splits["test"] = split
    if "validation" not in splits:
        splits |= _hold_out(splits["train"], data)
    for name, split in splits.items():
        most = data.max_train_samples if name == "train" else data.max_eval_samples
        splits[name] = split.select(range(min(most or len(split), len(split))))
    return splits


def _hold_out(train: Dataset, data: DataArguments) -> dict[str, Dataset]:
    stratify = next((name for name, feature in train.features.items() if isinstance(feature, ClassLabel)), None)
    split = {"test_size": data.validation_share, "seed": data.split_seed}
    try:
        halves = train.train_test_split(**split, stratify_by_column=stratify)
    except ValueError:  # a class with a single example, or fewer held out than classes
        halves = train.train_test_split(**split)
    return {"train": halves["train"], "validation": halves["test"]}


def column(splits: DatasetDict, asked: str | None, usual: Sequence[str], option: str) -> str:
    """The column that the user named, or else the first usual one that is there."""
    columns = splits["train"].column_names
    found = [name for name in ([asked] if asked else usual) if name in columns]
    if not found:
        wanted = f"no column {asked!r}" if asked else f"none of the columns {', '.join(usual)}"
        fail(f"the data has {wanted}; its columns are {', '.join(columns)}: name one with --{option}.")
    return found[0]


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
    auto_class: Any, options: StudentArguments, teacher: str | None = None, **config: Any
) -> PreTrainedModel:
    """The model to train: a checkpoint, some layers of one, or random weights by a config with overrides."""
    path = options.student_model_name_or_path or (teacher if options.student_layers else None)
    if path is None and options.student_model_type is None:
        fail("no student: give --student_model_name_or_path (a Hub id or a folder), or --student_model_type.")
    with loading("student", path, "give a folder with --student_model_name_or_path FOLDER"):
        make: Any = AutoConfig.for_model if path is None else AutoConfig.from_pretrained
        settings = make(path or options.student_model_type, **config)
        if path is None or options.student_config_overrides:
            return auto_class.from_config(_overridden(settings, options.student_config_overrides or ""))
        model = auto_class.from_pretrained(path, config=settings, ignore_mismatched_sizes=True)
    if options.student_layers is None:
        return model
    try:
        return keep_layers(model, [int(layer) for layer in options.student_layers.split(",")])
    except ValueError as error:
        fail(f"--student_layers {options.student_layers}: {error}")


def _overridden(config: Any, overrides: str) -> Any:
    changes = yaml.safe_load("{" + re.sub(r"(\w+)=", r"\1: ", overrides) + "}")
    unknown = [name for name in changes if not hasattr(config, name)]
    if unknown:
        fail(f"--student_config_overrides: {type(config).__name__} has no {', '.join(unknown)}.")
    config.update(changes)
    return config


def run(
    trainer: Any,
    splits: DatasetDict,
    settings: dict[str, Any],
    primary: str,
    table: Callable[[PredictionOutput], dict[str, Any]],
    higher_is_better: bool = True,
    **card: Any,
) -> None:
    """Train, evaluate, and save the model, its card, results.json and predictions.parquet.

    `settings`, the options that are not defaults, repeat the run as a `--config` file. `primary` is the metric by which
    runs are compared, `table` makes the columns of predictions.parquet, `card` goes to `Trainer.create_model_card`.
    """
    args = trainer.args
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    # Whatever was loaded before, the same seed gives the same order of batches and the same dropout.
    set_seed(args.seed)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    trainer.save_model()
    trainer.save_state()

    if trainer.teacher is not None:
        args.eval_with_teacher, args.include_for_metrics = True, [*args.include_for_metrics, "teacher_logits"]
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
        print(f"Wrote the model, results.json and predictions.parquet to {folder}.")
    (trainer.push_to_hub if args.push_to_hub else trainer.create_model_card)(**card)
