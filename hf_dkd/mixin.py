"""`DKDMixin`: what distillation adds to a Trainer. Orchestration only, no tensor math."""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, has_length

from . import evaluation, objective, reporting, rows
from .heads import Head, bare_model, head_of
from .teacher import TEACHER_PREFIX, Teacher, class_names_of
from .teacher_check import TeacherCheck
from .training_args import DKDArgumentsMixin

logger = logging.getLogger(__name__)


class DKDMixin:
    """Adds decoupled distillation to `Trainer` or a subclass of it: `class MyDKDTrainer(DKDMixin, MyTrainer)`.

    The teacher runs in `compute_loss`, whose objective is ce_weight·CE + w·T²·(α·TCKD + β·NCKD): sums over the labelled
    rows of the whole optimizer step, divided by their number N over all micro-batches and processes. CE is what the
    parent class's `compute_loss` returns. Without a teacher it is the parent class, but for N where that divides wrongly
    (https://github.com/huggingface/transformers/issues/47688).

    Args:
        teacher: a module, a path or Hub id, or a `Teacher`. Default: `args.teacher_model_name_or_path`.

    Raises:
        ValueError: where a teacher is given twice, where it is the student, or where it cannot be distilled: heads of an
            unknown kind, other class names, one class, or a parallelism that splits sequences.
    """

    def __init__(self, *args: Any, teacher: nn.Module | str | Teacher | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = self._load_teacher(teacher)
        self._prepared_student: nn.Module | None = None
        self._class_order: Tensor | None = None
        self._evaluating = False
        self._loss_is_scaled: bool | None = None
        self._start_terms()
        self._prepare_distillation()
        self.add_callback(_StartOfTraining(self))

    # ---- Settings ----

    @property
    def dkd_args(self) -> DKDArgumentsMixin:
        """The distillation settings: `args`, or the defaults where `args` has no such fields."""
        return self.args if isinstance(self.args, DKDArgumentsMixin) else DKDArgumentsMixin()

    @property
    def head(self) -> Head | None:
        """The kind of the student's head, from `dkd_head` or its architecture."""
        return Head(self.dkd_args.dkd_head) if self.dkd_args.dkd_head else head_of(self.model)

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:
        """Read by `Trainer.training_step`: whether `compute_loss` has already divided by the whole optimizer step."""
        return self._loss_is_scaled or getattr(super(), "loss_is_scaled_for_ga", None)

    @property
    def _data_parallel_size(self) -> int:
        # The engines average gradients over processes, so that a sum over processes is multiplied by their number.
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _rescales(self, batches: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the loss of `batches` is divided by our count of rows rather than by Trainer's rule."""
        if self.teacher is not None:
            return True
        if self.args.n_gpu > 1 or (self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1):
            return False
        head = self.head
        return head is not None and all(rows.has_labels(head, batch, self.label_names) for batch in batches)

    # ---- Teacher ----

    def _load_teacher(self, teacher: nn.Module | str | Teacher | None) -> Teacher | None:
        settings = self.dkd_args
        path = settings.teacher_model_name_or_path
        if teacher is not None and path is not None:
            raise ValueError(f"A teacher was passed and teacher_model_name_or_path is {path!r}: give one of the two.")
        teacher = path if teacher is None else teacher
        if isinstance(teacher, str):
            keywords = settings.teacher_model_init_kwargs or {}
            revision = settings.teacher_model_revision
            return Teacher.from_pretrained(teacher, self.model, revision=revision, **keywords)
        return Teacher(teacher) if isinstance(teacher, nn.Module) else teacher

    def _prepare_distillation(self) -> None:
        """Check that teacher and student go together, and place the teacher; once for each student."""
        if self.teacher is None or self._prepared_student is self.model:
            return
        head = self._distillable_head()
        self.teacher.prepare(self.model, self.args.device)
        order = None
        if head.has_named_classes:
            order = rows.class_order(class_names_of(self.model), self.teacher.class_names)
        if order is not None:
            self._say("Reordered the teacher's classes by name to the student's order.")
        self._class_order = None if order is None else torch.tensor(order, device=self.args.device)
        self._signature_columns = None
        self._prepared_student = self.model

    def _distillable_head(self) -> Head:
        head, name = self.head, type(bare_model(self.model)).__name__
        if head is None:
            raise ValueError(
                f"{name} is not known to emit class or token logits. Set dkd_head to one of {', '.join(Head)} to say how "
                "its labels stand beside its logits."
            )
        if head is Head.CLASSIFICATION and getattr(getattr(self.model, "config", None), "num_labels", 2) == 1:
            raise ValueError(f"{name} has num_labels=1, a regression head. Distillation needs at least two classes.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"Distillation does not run under torch.nn.DataParallel ({self.args.n_gpu} GPUs in one process). Launch "
                f"one process for each: accelerate launch --num_processes {self.args.n_gpu} your_script.py"
            )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("Distillation does not run with context or sequence parallelism, which split the rows.")
        return head

    def _say(self, message: str) -> None:
        if self.is_world_process_zero():
            logger.warning(message)

    # ---- Batches ----

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that only the teacher reads, and `teacher_` ones, when Trainer removes unused columns."""
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh and self.teacher is not None:
            columns = self.teacher.columns
            self._signature_columns += [*columns, *(TEACHER_PREFIX + name for name in columns)]
            self._signature_columns.append(TEACHER_PREFIX + getattr(self.model, "main_input_name", "input_ids"))

    def _student_columns(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """`inputs` without what only the teacher reads."""
        named = set(inspect.signature(bare_model(self.model).forward).parameters)
        of_teacher = set(self.teacher.columns) if self.teacher is not None and named & set(inputs) else set()
        keep = named | set(self.label_names)
        dropped = {
            name for name in inputs if name not in keep and (name in of_teacher or name.startswith(TEACHER_PREFIX))
        }
        return {name: value for name, value in inputs.items() if name not in dropped} if dropped else inputs

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Trainer's, with N, our count of labelled rows in the optimizer step over all data-parallel processes."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._rescales(batches):
            return batches, count
        counts = [rows.count_labelled(self.head, batch, self.label_names).to(device) for batch in batches]
        total = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum() // self.get_tp_size()
        # A step without any label is a sum of zeros, whatever it is divided by.
        return batches, total.clamp(min=1)

    # ---- Loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The micro-batch's share of the objective; in evaluation, the student's own task loss.

        `num_items_in_batch` is N, the labelled rows of the optimizer step. Without it the micro-batch is the whole step.
        """
        self._prepare_distillation()
        student_inputs = self._student_columns(inputs)
        rescales = self._rescales([inputs])
        self._loss_is_scaled = True if rescales else None
        if not rescales:
            return super().compute_loss(
                model, student_inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if self._evaluating:
            loss, outputs = self._task_loss(
                model, student_inputs, rows.count_labelled(self.head, inputs, self.label_names)
            )
        else:
            loss, outputs = self._distillation_loss(model, inputs, student_inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model: nn.Module, inputs: Mapping[str, Any], count: Tensor) -> tuple[Tensor, Any]:
        """The parent's loss as a mean over the `count` labelled rows of this batch alone."""
        own_function = self.compute_loss_func is not None
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=count if own_function else None
        )
        return (loss / self._data_parallel_size if own_function else loss), outputs

    def _distillation_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], student_inputs: Mapping[str, Any], total: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        settings, head = self.dkd_args, self.head
        count = rows.count_labelled(head, inputs, self.label_names)
        scale = objective.step_scale(
            count if total is None else total, 1 if total is None else self._data_parallel_size
        )
        distils = self.teacher is not None and settings.distils
        # Before the student's forward, so that the teacher's activations are gone when the student's are there.
        teacher_rows = self._teacher_rows(inputs) if distils else None

        own_function = self.compute_loss_func is not None
        hard, outputs = super().compute_loss(
            model, student_inputs, return_outputs=True, num_items_in_batch=total if own_function else None
        )
        if head is Head.QUESTION_ANSWERING and not own_function:
            # The head averages starts and ends apart, so that a window without one would weigh the other double.
            labels = rows.aligned_labels(head, inputs)
            hard = objective.cross_entropy_sum(rows.logits_of(outputs, "student"), labels) * scale
        elif not own_function or total is None:
            hard = objective.share_of_step(hard, count, scale)

        if self.teacher is None:
            return self._for_training_step(hard, total), outputs

        loss = settings.ce_weight * hard if settings.ce_weight else torch.zeros_like(hard)
        terms = {"ce": hard, "dkd": torch.zeros_like(hard)}
        if teacher_rows is not None:
            self._weight = settings.dkd_weight(
                self.state.global_step + 1, self.state.max_steps, self._steps_per_epoch()
            )
            sums = objective.distillation_sums(self._side_by_side(inputs, outputs, teacher_rows), settings)
            terms |= {name: scale * value for name, value in sums._asdict().items()}
            terms["dkd"] = self._weight * terms["dkd"]
            loss = loss + terms["dkd"]
        if not self._terms:
            self._first_step = self.state.global_step
        self._terms.add(**terms)
        return self._for_training_step(loss, total), outputs

    def _teacher_rows(self, inputs: Mapping[str, Any]) -> Tensor:
        """The teacher's logits at the labelled rows of `inputs`, (R, C)."""
        labels = rows.aligned_labels(self.head, inputs, self.label_names)
        with self.accelerator.autocast():
            logits = self.teacher.logits(inputs)
        return rows.labelled_rows(logits, labels, "teacher", self._visible(inputs))

    def _side_by_side(self, inputs: Mapping[str, Any], outputs: Any, teacher_rows: Tensor) -> rows.Rows:
        """The student's rows beside the teacher's, over the same classes and checked."""
        labels = rows.aligned_labels(self.head, inputs, self.label_names)
        student_rows = rows.labelled_rows(rows.logits_of(outputs, "student"), labels, "student", self._visible(inputs))
        labels = labels[labels != rows.IGNORE_INDEX]
        aligned = rows.aligned_rows(self.head, student_rows, teacher_rows, labels, self._class_order)
        if aligned.student.shape[1] < max(student_rows.shape[1], teacher_rows.shape[1]) and not self._said_vocabulary:
            self._said_vocabulary = True
            self._say(
                f"Vocabularies of {student_rows.shape[1]} (student) and {teacher_rows.shape[1]} (teacher) rows: distilling "
                f"over the {aligned.student.shape[1]} that they share; the others are taken for padding."
            )
        read = [name for name in self.teacher.inputs(inputs) if name != "use_cache"]
        self._teacher_check.update(objective.unusable_rows(aligned), self.state.global_step + 1, read)
        return aligned

    def _visible(self, inputs: Mapping[str, Any]) -> Tensor | None:
        return inputs.get("attention_mask") if self.head is Head.QUESTION_ANSWERING else None

    def _for_training_step(self, loss: Tensor, total: Tensor | int | None) -> Tensor:
        # Before `loss_is_scaled_for_ga`, `training_step` divides by the accumulation steps whatever `compute_loss` did.
        divides = (not self.model_accepts_loss_kwargs or total is None) and self.compute_loss_func is None
        if hasattr(Trainer, "loss_is_scaled_for_ga") or not divides:
            return loss
        return loss * getattr(self, "current_gradient_accumulation_steps", 1)

    def _steps_per_epoch(self) -> int | None:
        dataloader = self.callback_handler.train_dataloader
        if dataloader is None or not has_length(dataloader):
            return None
        return math.ceil(len(dataloader) / self.args.gradient_accumulation_steps)

    # ---- Logs ----

    def _start_terms(self) -> None:
        self._terms, self._eval_terms = objective.RunningTerms(), objective.RunningTerms()
        self._teacher_check = TeacherCheck()
        self._weight = 1.0
        self._first_step = 0
        self._said_vocabulary = False

    def _begin_training(self) -> None:
        self.dkd_args.check_distillation()
        self._start_terms()
        self._prepare_distillation()
        if self.teacher is None:
            self._say("No teacher: training on the task loss alone, as Trainer does.")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the terms of the loss: means over the optimizer steps since the last log, over all processes."""
        if "loss" in logs and self._terms:
            self._teacher_check.raise_if_bad(wait=True)
            steps = max(self.state.global_step - self._first_step, 1)
            logs |= {name: total / steps for name, total in self._terms.drain(self.accelerator).items()}
            logs["dkd_weight"] = self._weight
        super().log(logs, *args, **kwargs)

    # ---- Evaluation ----

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, with the teacher's terms where `eval_with_teacher` asks for them."""
        if self.gather_function == self.accelerator.gather:
            # Seq2SeqTrainer's choice keeps the examples that fill up the last batch of several processes.
            self.gather_function = self.accelerator.gather_for_metrics
        self._eval_terms = objective.RunningTerms()
        pairs = self._metrics_want_teacher()
        with evaluation.teacher_logits_for_metrics(self) if pairs else nullcontext():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        if self._eval_terms:
            self._teacher_check.raise_if_bad(wait=True)
            sums = self._eval_terms.drain(self.accelerator, "sum")
            count = max(sums.pop("count"), 1.0)
            output.metrics.update({f"{metric_key_prefix}_{name}": total / count for name, total in sums.items()})
        return evaluation.student_predictions_only(output) if pairs else output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's on the student alone, with the teacher beside it where evaluation asks for it."""
        inputs = self._prepare_inputs(inputs)
        head = self.head
        labelled = head is not None and rows.has_labels(head, inputs, self.label_names)
        counted = evaluation.real_examples(self.accelerator, inputs)
        if labelled and counted is not None:
            inputs = rows.without_labels_from(head, inputs, counted, self.label_names)
        with self._in_evaluation(), evaluation.last_output(model) as outputs:
            loss, logits, labels = super().prediction_step(
                model, dict(self._student_columns(inputs)), prediction_loss_only, ignore_keys=ignore_keys, **kwargs
            )
        if self.teacher is not None and labelled and self.dkd_args.eval_with_teacher:
            self._add_eval_terms(inputs, outputs[0])
        if self._metrics_want_teacher() and logits is not None:
            with self.accelerator.autocast():
                logits = (logits, self.teacher.logits(inputs))
        return loss, logits, labels

    def _add_eval_terms(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        with torch.no_grad():
            aligned = self._side_by_side(inputs, outputs, self._teacher_rows(inputs))
            sums = objective.distillation_sums(aligned, self.dkd_args)
            self._eval_terms.add(
                tckd=sums.tckd,
                nckd=sums.nckd,
                teacher_agreement=sums.teacher_agreement,
                teacher_accuracy=(aligned.teacher.argmax(1) == aligned.labels).sum(),
                count=torch.tensor(len(aligned.labels), device=sums.tckd.device),
            )

    def _metrics_want_teacher(self) -> bool:
        return self.teacher is not None and "teacher_logits" in self.args.include_for_metrics

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    # ---- Model card ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with a section on the distillation: the teacher, the settings and the final terms."""
        super().create_model_card(*args, **kwargs)
        if self.teacher is not None and self.is_world_process_zero():
            reporting.add_to_model_card(self.args.output_dir, self.teacher.name, self.dkd_args, self.state.log_history)


class _StartOfTraining(TrainerCallback):
    """Checks the settings again when training starts: a search sets them after construction, within `train`."""

    def __init__(self, trainer: DKDMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()
