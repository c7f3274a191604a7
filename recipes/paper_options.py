"""The options of `paper_cifar100.py`; which ones it refuses, and which ones change nothing that is learned."""

from dataclasses import dataclass
from typing import Any

from common import fail, option
from paper_presets import CIFAR, DEFAULT_PAIR, PAIRS, published
from vit_cifar100 import ImageDataArguments

from hf_dkd import DKDTrainingArguments


@dataclass
class PaperArguments(ImageDataArguments):
    validation_share: float | None = option(None, "Held out, to be watched instead of the test set, as for tuning.")
    image_size: int = option(32, "Pixels a side, of CIFAR-100.")
    label_noise: float = option(0.0, "Share of the training images that get the label of another class.")
    auto_augment: bool = option(False, "AutoAugment besides, for CIFAR-100; --dataloader_num_workers make it faster.")
    student_model_name_or_path: str | None = option(None, "Start from this checkpoint instead of random weights.")
    minutes: float | None = option(None, "Write a checkpoint and stop after this time.")

    def __post_init__(self) -> None:
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}; expected a time above 0.")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is {self.label_noise}; expected a share from 0 to 1.")


@dataclass
class PaperTrainingArguments(DKDTrainingArguments):
    """What is not given is the paper's.

    Raises:
        ValueError: for epochs that are not above 0, and as `DKDTrainingArguments`.
    """

    pair: str = option(DEFAULT_PAIR, "Teacher and student.", choices=list(PAIRS))
    teacher_model_name_or_path: str | None = option(
        None,
        "Folder of the teacher; one for CIFAR-100 is trained there if it holds none. By default in outputs/teachers.",
        aliases=["--teacher"],
    )
    other_teacher: bool = option(False, "Take a teacher of another architecture than the pair's.")
    num_train_epochs: float = option(None, "Milestones and warm-up go along.", aliases=["--epochs"])
    teacher_epochs: float | None = option(None, "Those of a teacher that is trained first; by default as many.")
    optim: str = option("sgd", "SGD with momentum 0.9, and no other.")
    learning_rate: float = option(None, "By default the pair's.")
    lr_scheduler_type: str = option("constant", "Constant up to the paper's milestones, and no other.")
    weight_decay: float = option(None, "By default the paper's.")
    per_device_train_batch_size: int = option(None, "By default the paper's batch, divided among the processes.")
    ce_weight: float = option(None, "By default 1; for kd 0.1, on ImageNet 0.5.")
    dkd_alpha: float = option(None, "By default 1; for kd 0.9, on ImageNet 0.5.")
    dkd_beta: float = option(None, "By default the pair's.")
    dkd_temperature: float = option(None, "By default 4, on ImageNet 1.")
    dkd_warmup_epochs: float = option(None, "By default a twelfth of the epochs, on ImageNet a hundredth; for kd none.")
    dkd_warmup_staircase: bool = option(True, "Hold the weight within an epoch; --dkd_warmup_steps ends this.")
    kd_warmup: bool = option(False, "Give kd the warm-up of dkd.")
    output_dir: str = option("outputs/paper_cifar100", "Where the student goes; kept for one training.")
    per_device_eval_batch_size: int = 500
    max_grad_norm: float = 0.0
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 1
    resume_from_checkpoint: str | None = option("last", "A checkpoint, or the last one in --output_dir, if there is.")
    logging_steps: float = 100
    logging_nan_inf_filter: bool = False  # it reads the device at every step
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        schedule = PAIRS[self.pair].schedule
        if self.num_train_epochs is None:
            self.num_train_epochs = schedule.epochs
        for name in ("num_train_epochs", "teacher_epochs"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number above 0, such as 0.1.")
        if self.dkd_warmup_steps and self.dkd_warmup_epochs is None:
            self.dkd_warmup_epochs, self.dkd_warmup_staircase = 0.0, False
        for name, value in published(self.pair, self.distillation, self.num_train_epochs, self.kd_warmup).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.kd_warmup and self.distillation != "kd":
            raise ValueError(
                f"kd_warmup is for kd, and distillation is {self.distillation}, which warms up: leave it out."
            )


# What the trainer does not follow, and what to do instead.
_OPTIMIZER = "the optimizer is SGD with momentum 0.9: leave it out, or change PaperTrainer.create_optimizer"
_RATE = (
    "the learning rate changes at the paper's milestones alone: leave it out, or change PaperTrainer.create_scheduler"
)
_NOT_FOLLOWED = {
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), _OPTIMIZER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _OPTIMIZER),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"), _RATE),
    "max_steps": "give --epochs, which may be below 1: the milestones and the warm-up go along",
    "eval_strategy": "the last and the best epoch are told: leave --eval_strategy epoch as it is",
    "save_only_model": "no training could go on from such checkpoints: leave it out",
}
_NOT_ON_IMAGENET = {
    "auto_augment": "it is for the pairs of CIFAR-100: leave it out",
    "image_size": "the pairs of ImageNet take 224 pixels: leave it out",
    "teacher_epochs": "the teachers for ImageNet are not trained here: leave it out",
    "other_teacher": "any teacher for ImageNet is taken: give it with --teacher",
}


def refuse_what_is_not_followed(settings: dict[str, Any], pair: str) -> None:
    """Stop with one line for an option, of those given, that would make no difference or half of one."""
    remedies = _NOT_FOLLOWED if PAIRS[pair].schedule is CIFAR else _NOT_FOLLOWED | _NOT_ON_IMAGENET
    for name in settings:
        if name in remedies:
            fail(f"--{name} {settings[name]} cannot be followed: {remedies[name]}.")


# What changes nothing that is learned, of a run and of the teacher that it trains.
HARMLESS = {
    "per_device_eval_batch_size", "eval_accumulation_steps", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "disable_tqdm", "report_to", "run_name",
}  # fmt: skip
HARMLESS_BEGINNINGS = ("logging_", "log_", "save_")
# The same, of a run alone. Its precision is kept as `mixed_precision`, which the launcher may set too.
_OF_THE_RUN = ("minutes", "output_dir", "resume_from_checkpoint", "eval_with_teacher", "push_to_hub", "bf16", "fp16")


def is_harmless(name: str) -> bool:
    """Whether an option may differ when a training goes on, and from run to run of one line of the table."""
    return name in HARMLESS or name in _OF_THE_RUN or name.startswith((*HARMLESS_BEGINNINGS, "hub_"))
