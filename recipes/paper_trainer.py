"""The trainer of `paper_cifar100.py` and its models."""

from typing import Any

import torch
from cifar_models import config_of
from paper_data import Images
from paper_presets import IMAGENET_STUDENTS, PAIRS
from torch.optim.lr_scheduler import MultiStepLR
from transformers import AutoConfig, AutoModelForImageClassification, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_dkd import DKDTrainer
from hf_dkd.images import CountEpochs
from hf_dkd.metrics import classification_metrics


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

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, but from a checkpoint at the end of this training no step is taken."""
        checkpoint = resume_from_checkpoint
        if not isinstance(checkpoint, str):
            return super().train(checkpoint, *args, **kwargs)
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        # A shorter training may have ended there; and with accumulation the epochs may be over before the last step.
        if state.epoch is None or state.epoch < self.args.num_train_epochs or state.global_step < state.max_steps:
            return super().train(checkpoint, *args, **kwargs)
        # From the end of half an epoch Trainer would go on for one step more.
        self._load_from_checkpoint(checkpoint)
        self.state = state
        state.is_world_process_zero = self.is_world_process_zero()
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        if not any("eval_accuracy" in entry and entry["epoch"] == state.epoch for entry in state.log_history):
            self.evaluate()  # with save_strategy steps the checkpoint is written before
        return TrainOutput(state.global_step, 0.0, {})

    # Steps are so short here that it shows what Trainer does in each beside training.

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not told: Trainer's estimate walks all weights, and is one of transformers."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Not told where gradients are not clipped: Trainer would compute it, and scale them by 1."""
        return grad_norm


def settle_compilation() -> None:
    """What `torch.compile` is to do with models that share one `forward`: compile each, in training and evaluation."""
    torch._dynamo.config.automatic_dynamic_shapes = False  # the last batch of an epoch is smaller: it is compiled apart
    torch._dynamo.config.recompile_limit = 64  # beyond 8, the default, the rest would run as it is without a word


def make_model(name: str, labels: list[str]) -> Any:
    """A model of the benchmark with random weights."""
    classes: dict[str, Any] = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    classes["label2id"] = {label: number for number, label in enumerate(labels)}
    if name not in IMAGENET_STUDENTS:
        return AutoModelForImageClassification.from_config(config_of(name, **classes))
    kind, changes = IMAGENET_STUDENTS[name]
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **classes, **changes))
    for part in model.modules() if kind == "mobilenet_v1" else ():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.1  # its 0.9997 is TensorFlow's: here it would forget all batches but the last
        elif isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            part.reset_parameters()  # the authors' starts as PyTorch's layers do, not from a normal of 0.02
    return model


def make_trainer(model: Any, images: Images, args: Any, callbacks: list[TrainerCallback], teacher: Any = None) -> Any:
    """The trainer of a student, or without `teacher` of any model on the labels alone; it watches validation or test.

    Raises:
        ValueError: from `DKDTrainer`, for a teacher that does not fit the model.
    """
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
