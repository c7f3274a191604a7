"""The teacher of `paper_cifar100.py`: found in its folder, or trained there with the published settings."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import common
from accelerate import PartialState
from cifar_models import ARCHITECTURES, config_of
from common import fail
from paper_data import Images
from paper_folders import checkpoint_to_resume, finished, kept_for, on_main, refuse_another
from paper_options import HARMLESS, HARMLESS_BEGINNINGS, PaperArguments, PaperTrainingArguments
from paper_presets import CIFAR, PAIRS, TEACHER_LEARNING_RATE
from paper_trainer import make_model, make_trainer
from transformers import AutoModelForImageClassification, TrainerCallback, set_seed

from hf_dkd import Teacher
from hf_dkd.time_limit import TimeLimit

# What a teacher learns from.
_IMAGES = (
    "dataset_name", "dataset_config_name", "train_file", "label_column_name", "max_train_samples", "validation_share",
    "split_seed", "image_size", "label_noise", "auto_augment",
)  # fmt: skip
# What the machine needs: a teacher is trained as its student is.
_OF_THE_MACHINE = {
    "seed", "full_determinism", "bf16", "fp16", "tf32", "use_cpu", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "ddp_backend", "ddp_timeout",
}  # fmt: skip


def teacher_path(data: PaperArguments, args: PaperTrainingArguments) -> str:
    """Where the teacher is: for CIFAR-100 a folder for each kind of images, as it learns from the student's."""
    name = PAIRS[args.pair].teacher
    if args.teacher_model_name_or_path or name not in ARCHITECTURES:
        return args.teacher_model_name_or_path or name
    size = f"-{data.image_size}px" if data.image_size != 32 else ""
    noise = f"-noise{data.label_noise:g}" if data.label_noise else ""
    return f"outputs/teachers/{name}{size}{noise}{'-auto_augment' if data.auto_augment else ''}"


def teacher_arguments(folder: str, args: PaperTrainingArguments) -> PaperTrainingArguments:
    """The published settings, whatever the student's are, for as many epochs, or `teacher_epochs`."""
    shared = HARMLESS | _OF_THE_MACHINE | {"pair", "max_steps"}
    names = [one.name for one in fields(args) if one.name in shared or one.name.startswith(HARMLESS_BEGINNINGS)]
    return PaperTrainingArguments(
        output_dir=folder,
        num_train_epochs=args.teacher_epochs or args.num_train_epochs,
        learning_rate=TEACHER_LEARNING_RATE,
        **{name: getattr(args, name) for name in names},
    )


def teacher_settings(data: PaperArguments, args: PaperTrainingArguments) -> dict[str, Any]:
    """What makes a teacher that is trained with `args` another one; the seed does not."""
    processes = PartialState().num_processes
    own: dict[str, Any] = {"teacher": PAIRS[args.pair].teacher, "teacher_epochs": args.num_train_epochs}
    own |= {"max_steps": args.max_steps, "batch_size": args.per_device_train_batch_size * processes}
    own |= {"processes": processes, "mixed_precision": args.mixed_precision}
    return own | {name: getattr(data, name) for name in _IMAGES}


def make_ready(
    folder: str, images: Images, data: PaperArguments, args: PaperTrainingArguments, limit: TimeLimit | None
) -> None:
    """Train the teacher of a pair of CIFAR-100 in its folder, unless it is there; one run does, others wait."""
    if PAIRS[args.pair].schedule is not CIFAR or not on_main(lambda: is_of_this_recipe(folder)):
        return
    args = teacher_arguments(folder, args)
    settings = teacher_settings(data, args)
    if on_main(lambda: finished(folder)):
        refuse_another(folder, settings)
        return
    with kept_for(folder, settings, limit):
        if not on_main(lambda: finished(folder)):
            train(images, args, [limit] if limit else [])


def is_of_this_recipe(folder: str) -> bool:
    """Whether a teacher was trained, or is to be trained, by `make_ready`; students may teach as they are."""
    file = Path(folder, "training.json")
    return "teacher" in json.loads(file.read_text()) if file.exists() else not Path(folder, "config.json").exists()


def train(images: Images, args: PaperTrainingArguments, callbacks: list[TrainerCallback]) -> None:
    """Train the teacher in `args.output_dir`, on the labels alone, as the authors of the benchmark did."""
    name, folder = PAIRS[args.pair].teacher, args.output_dir
    checkpoint = checkpoint_to_resume(str(folder))
    if PartialState().is_main_process:
        there = "a part of one" if checkpoint else "none"
        print(f"Training the teacher {name} in {folder} first: it holds {there}.", flush=True)
    set_seed(args.seed)
    trainer = make_trainer(make_model(name, images.names), images, args, callbacks)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()  # last: it tells that the weights are there
    trainer.accelerator.wait_for_everyone()


def load_teacher(path: str, images: Images, args: PaperTrainingArguments) -> Teacher:
    """The teacher, whose classes are the data's; ImageNet's have other names on the Hub, in the same order."""
    with common.loading("teacher", path):
        options: Any = args.teacher_model_init_kwargs or {}
        model = AutoModelForImageClassification.from_pretrained(path, revision=args.teacher_model_revision, **options)
        check_config(path, model.config, images, args)
        return Teacher(model, label_names=None if PAIRS[args.pair].schedule is CIFAR else images.names)


def check_classes(name: str, config: Any, images: Images, same_order: bool = False, other_names: bool = False) -> None:
    """Stop with one line for a model of other classes than the data's, which may be in another order.

    With `same_order` they may not. With `other_names`, and where they are LABEL_0 and so on, only their number counts.
    """
    if config.num_labels != len(images.names):
        fail(
            f"{name} has {config.num_labels} classes and the data {len(images.names)}: give one that was trained on "
            "this data."
        )
    told = [str(config.id2label[number]) for number in sorted(config.id2label)]
    same = told == images.names if same_order else {*told} == {*images.names}
    if not (same or other_names or told[0].startswith("LABEL_")):
        first = next(pair for pair in zip(told, images.names, strict=True) if pair[0] != pair[1])
        fail(
            f"{name} names other classes than the data, such as {first[0]!r} for {first[1]!r}: if they are the same, "
            "write the data's names into id2label of its config.json."
        )


def check_config(path: str, config: Any, images: Images, args: PaperTrainingArguments) -> None:
    """Stop with one line for a teacher of other classes than the data's, or of another architecture than the pair's."""
    check_classes(f"the teacher {path}", config, images, other_names=PAIRS[args.pair].schedule is not CIFAR)
    name = PAIRS[args.pair].teacher
    if name not in ARCHITECTURES or args.other_teacher:
        return
    wanted = config_of(name)
    of_both = {field: [getattr(one, field, None) for one in (config, wanted)] for field in type(wanted).__annotations__}
    of_both |= {"model_type": [config.model_type, wanted.model_type]}
    differences = [f"{field} {a} and not {b}" for field, (a, b) in of_both.items() if json.dumps(a) != json.dumps(b)]
    if differences:
        fail(
            f"the teacher {path} is no {name}, with {', '.join(differences)}: give one with --teacher FOLDER, or say "
            "--other_teacher true."
        )
