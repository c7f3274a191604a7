"""The benchmark of the paper: a pair of models on CIFAR-100, or on ImageNet, with the published settings.

    accelerate launch recipes/paper_cifar100.py --pair resnet32x4-resnet8x4 --bf16 --torch_compile --teacher_compile

trains the teacher, if `--teacher FOLDER` holds none yet, and distils it. `--distillation kd` is the paper's classical
KD, `--dkd_alpha 0 --dkd_beta 0` trains on the labels alone. `--epochs 60` is the same schedule in a quarter of its
time. With `--minutes 10` it stops after these; the same command goes on from there.

The ImageNet pairs take `--dataset_name FOLDER` with train/CLASS/*.JPEG and val/CLASS/*.JPEG. `paper_ablations.yaml` has
the paper's ablations, for `compare.py`; `paper_table.py` sets what runs reached beside what the paper reports. Pairs
and settings are in `paper_presets.py`, the images in `paper_data.py`, the models in `cifar_models`.
"""

import copy
from pathlib import Path
from typing import Any

import common
import torch
from cifar_models import config_of
from common import fail, parse
from paper_data import Images, PaperArguments, claim, load, teacher_folder, teacher_settings
from paper_presets import CIFAR, IMAGENET_STUDENTS, PAIRS, TEACHER_LEARNING_RATE, PaperTrainingArguments
from torch.optim.lr_scheduler import MultiStepLR
from transformers import AutoConfig, AutoModelForImageClassification, TrainerCallback, set_seed

from hf_dkd import DKDTrainer, Teacher
from hf_dkd.images import CountEpochs
from hf_dkd.metrics import classification_metrics
from hf_dkd.time_limit import TimeLimit, last_checkpoint

ARGUMENTS = (PaperArguments, PaperTrainingArguments)
FREE = ("minutes", "output_dir", "resume_from_checkpoint")  # may differ when a training goes on


class PaperTrainer(DKDTrainer):
    """SGD with momentum, decay of all weights, and a learning rate that falls to a tenth at the milestones."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        args, model = self.args, model or self.model
        self.optimizer: Any = torch.optim.SGD(
            model.parameters(), args.learning_rate, momentum=0.9, weight_decay=args.weight_decay
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        pair: str = self.args.pair  # type: ignore[attr-defined]
        milestones = [round(share * num_training_steps) for share in PAIRS[pair].schedule.milestones]
        self.lr_scheduler: Any = MultiStepLR(optimizer or self.optimizer, milestones)
        return self.lr_scheduler


def make_model(name: str, labels: list[str]) -> Any:
    """A model of the benchmark with random weights."""
    classes: dict[str, Any] = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    classes["label2id"] = {label: number for number, label in enumerate(labels)}
    if name not in IMAGENET_STUDENTS:
        return AutoModelForImageClassification.from_config(config_of(name, **classes))
    kind, changes = IMAGENET_STUDENTS[name]
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **classes, **changes))
    for norm in (part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)):
        norm.momentum = 0.1  # MobileNetV1's 0.9997 is TensorFlow's: here it would forget all batches but the last
    return model


def make_trainer(model: Any, images: Images, args: Any, callbacks: list[TrainerCallback], teacher: Any = None) -> Any:
    return PaperTrainer(
        model=model,
        args=args,
        data_collator=images.collator,
        train_dataset=images.splits["train"],
        eval_dataset=images.splits.get("validation", images.splits.get("test")),
        processing_class=images.processor,
        compute_metrics=classification_metrics,
        callbacks=[CountEpochs(), *callbacks],
        teacher=teacher,
    )


def train_teacher(name: str, images: Images, args: Any, callbacks: list[TrainerCallback]) -> None:
    """Train the teacher in its folder, on the labels alone, as the authors of the benchmark did."""
    args = copy.copy(args)
    args.output_dir, args.teacher_model_name_or_path = args.teacher_model_name_or_path, None
    args.num_train_epochs = args.teacher_epochs or args.num_train_epochs
    args.learning_rate = TEACHER_LEARNING_RATE
    set_seed(args.seed)
    trainer = make_trainer(make_model(name, images.names), images, args, callbacks)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.save_model()
    trainer.save_state()  # last: it tells that the weights are there
    trainer.accelerator.wait_for_everyone()


def load_teacher(path: str, images: Images, args: Any) -> Teacher:
    """The teacher, whose classes are those of the data; ImageNet's have other names on the Hub, in the same order."""
    with common.loading("teacher", path):
        options = args.teacher_model_init_kwargs or {}
        model = AutoModelForImageClassification.from_pretrained(path, revision=args.teacher_model_revision, **options)
        return Teacher(model, label_names=images.names)


def build(
    data: PaperArguments, args: PaperTrainingArguments, callbacks: list[TrainerCallback] | None = None
) -> tuple[PaperTrainer, dict[str, Any]]:
    """The trainer of the student, whose teacher is trained first if need be, and the splits."""
    pair, callbacks, path = PAIRS[args.pair], callbacks or [], args.teacher_model_name_or_path
    images = load(data, args)
    if pair.schedule is CIFAR:
        path = args.teacher_model_name_or_path = path or teacher_folder(pair.teacher, data)
        trained_here = not Path(path, "config.json").exists() or Path(path, "training.json").exists()
        if trained_here:
            claim(path, teacher_settings(pair.teacher, data, args))
        if trained_here and not Path(path, "trainer_state.json").exists():
            train_teacher(pair.teacher, images, args, callbacks)
    path, args.teacher_model_name_or_path = path or pair.teacher, None
    teacher = load_teacher(path, images, args)
    set_seed(args.seed)
    start = data.student_model_name_or_path
    with common.loading("student", start):
        auto = AutoModelForImageClassification
        model = make_model(pair.student, images.names) if start is None else auto.from_pretrained(start)
    trainer = make_trainer(model, images, args, callbacks, teacher)
    args.teacher_model_name_or_path = path  # for results.json
    return trainer, images.splits


def accuracies(history: list[dict[str, float]]) -> tuple[float, float, float]:
    """Of the last epoch, of the best one, and which one that was, from the log of a run."""
    epochs = [(entry["eval_accuracy"], entry["epoch"]) for entry in history if "eval_accuracy" in entry]
    if not epochs:
        fail("the run was not evaluated: leave --eval_strategy epoch as it is.")
    best, epoch = max(epochs)
    return epochs[-1][0], best, epoch


def main() -> None:
    data, args, settings = parse(*ARGUMENTS)
    if args.torch_compile or args.teacher_compile:  # the last batch of an epoch is smaller: it is compiled apart
        torch._dynamo.config.automatic_dynamic_shapes = False
    claim(args.output_dir, {name: value for name, value in settings.items() if name not in FREE})
    trainer, splits = build(data, args, [TimeLimit(data.minutes)] if data.minutes else [])
    dataset = data.train_file or data.dataset_name
    common.run(trainer, splits, settings, primary="accuracy", tasks="image-classification", dataset=dataset)
    if trainer.is_world_process_zero():
        last, best, epoch = accuracies(trainer.state.log_history)
        print(f"Accuracy: last epoch {100 * last:.2f} %, best epoch {100 * best:.2f} % (epoch {epoch:g}).")


if __name__ == "__main__":
    main()
