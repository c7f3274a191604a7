"""`DKDTrainer` and `DKDSeq2SeqTrainer`: the trainers of transformers with a frozen teacher beside the student."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BaseImageProcessor,
    DataCollator,
    EvalPrediction,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from . import reporting
from .evaluation import DistillationEvaluation
from .teacher import Teacher

ProcessingClass = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin | None


class DKDMixin(DistillationEvaluation):
    """Adds decoupled distillation to `Trainer` or a subclass of it: `class MyDKDTrainer(DKDMixin, MyTrainer)`.

    The teacher runs in `compute_loss`, whose objective is ce_weight·CE + w·T²·(α·TCKD + β·NCKD): sums over the labelled
    rows of the whole optimizer step, divided by their number N over all micro-batches and processes. CE is what the
    parent class's `compute_loss` returns: called without a count, a mean over the labels of the micro-batch. Without a
    teacher it is the parent class, but for N where that one is wrong
    (https://github.com/huggingface/transformers/issues/47688).

    A batch without labels has no CE, and the parent's `compute_loss` is not called for it. Mixed examples, which
    `Trainer`'s own cannot take, have the cross-entropy with their shares, or what a parent's own `compute_loss` makes
    of labels (B, C). Where the teacher labels rows (`dkd_target`), the distillation term is a mean over all rows that
    it distils.

    Args:
        teacher: a module, a path or Hub id, or a `Teacher`. Default: `args.teacher_model_name_or_path`.

    Raises:
        ValueError: where a teacher is given twice, is the student, or cannot be distilled: heads of an unknown kind,
            other class names, one class, or a parallelism that splits sequences.
    """

    def __init__(self, *args: Any, teacher: nn.Module | str | PathLike | Teacher | None = None, **kwargs: Any) -> None:
        super().__init__(*args, teacher=teacher, **kwargs)
        self.add_callback(_TrainingWatch(self))

    def _begin_training(self) -> None:
        self.dkd_args.check_distillation()
        self._start_terms()
        self._prepared_student = None
        self._prepare_distillation()
        if self.teacher is None:
            self._say("No teacher: training on the task loss alone.")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the terms of the loss: means over the steps since the last log, on all processes."""
        if "loss" in logs and self._terms:
            self._teacher_check.raise_if_bad(wait=True)
            steps = max(self.state.global_step - self._first_step, 1)
            logs |= {name: total / steps for name, total in self._terms.drain(self.accelerator).items()}
            logs["dkd_weight"] = self._weight
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._reload(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._reload(self.state.best_model_checkpoint, self.model)

    def _reload(self, checkpoint: str | None, model: Any) -> None:
        # Trainer reads by the names of parameters, but save_pretrained writes older names for ViT, DeiT, BEiT,
        # Swin and Mixtral, which only from_pretrained maps back: https://github.com/huggingface/transformers/issues/48805
        sharded = (
            self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or getattr(model, "is_distributed_loading_by_transformers", False)
        )
        adapted = hasattr(model, "peft_config") or getattr(model, "hf_quantizer", None) is not None
        # A missing folder is Trainer's to warn of.
        found = checkpoint is not None and Path(checkpoint).is_dir()
        if not found or not isinstance(model, PreTrainedModel) or sharded or adapted:
            return
        missed = _names_not_in(str(checkpoint), model)
        if missed:
            saved = type(model).from_pretrained(str(checkpoint), config=model.config, dtype=model.dtype).state_dict()
            model.load_state_dict({name: saved[name] for name in missed}, strict=False)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with a section on the distillation: the teacher, the settings and the final terms."""
        super().create_model_card(*args, **kwargs)
        if self.teacher is not None and self.is_world_process_zero():
            reporting.add_to_model_card(
                str(self.args.output_dir), self.teacher.name, self.dkd_args, self.state.log_history
            )


def _names_not_in(checkpoint: str, model: PreTrainedModel) -> list[str]:
    """The weights of `model` whose names the files of `checkpoint` lack; tied ones need only one name."""
    files = [safe_open(file, "pt") for file in Path(checkpoint).glob("model*.safetensors")]
    stored = set().union(*(file.keys() for file in files))
    weights = model.state_dict()
    found = {weights[name].data_ptr() for name in stored & weights.keys()}
    return [name for name, weight in weights.items() if name not in stored and weight.data_ptr() not in found]


class _TrainingWatch(TrainerCallback):
    """Checks the settings again when training starts, since a search sets them within `train`, and the teacher's last
    outputs when it ends.
    """

    def __init__(self, trainer: DKDMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._teacher_check.raise_if_bad(wait=True)


class DKDTrainer(DKDMixin, Trainer):
    """`transformers.Trainer` with a teacher: replace `Trainer(...)` by `DKDTrainer(..., teacher=...)`.

    The other parameters, and every method, are Trainer's. `args` may be plain `TrainingArguments`, for the default
    settings, or `DKDTrainingArguments`. See `DKDMixin` for the objective and the errors.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessingClass = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        teacher: nn.Module | str | PathLike | Teacher | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            teacher=teacher,
        )


class DKDSeq2SeqTrainer(DKDMixin, Seq2SeqTrainer):  # type: ignore[misc]  # its prediction_step names gen_kwargs
    """`transformers.Seq2SeqTrainer` with a teacher; for `args`, its own class or `DKDSeq2SeqTrainingArguments`."""

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessingClass = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        teacher: nn.Module | str | PathLike | Teacher | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            teacher=teacher,
        )
