"""The training half of `DKDMixin`: teacher and student side by side in `compute_loss`. No tensor math."""

import inspect
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from . import objective, rows
from .heads import Head, bare_model, head_of
from .teacher import TEACHER_PREFIX, Teacher, class_names_of
from .teacher_check import TeacherCheck
from .training_args import DKDArgumentsMixin

logger = logging.getLogger(__name__)


@lru_cache
def _named_inputs(model_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class TeacherRows(NamedTuple):
    """The teacher's half of a micro-batch, and what is needed to take the student's rows at the same places."""

    rows: Tensor
    labels: Tensor
    positions: Tensor | None
    visible: Tensor | None
    columns: list[str]


def _is_loss_of(outputs: Any, loss: Tensor) -> bool:
    """Whether `loss` is the one that the model itself computed."""
    first = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0] if isinstance(outputs, tuple) else None
    return first is loss


class DistillationTraining(_Trainer):
    """Counts the labelled rows of an optimizer step, and computes a micro-batch's share of the objective over them."""

    teacher: Teacher | None = None
    # Set by `prediction_step`: what `compute_loss` returns is then the task loss alone.
    _evaluating = False

    def __init__(
        self, *args: Any, teacher: nn.Module | str | os.PathLike | Teacher | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._parents_scaling = getattr(self, "loss_is_scaled_for_ga", None)
        self.teacher = self._load_teacher(teacher)
        self._class_order: Tensor | None = None
        self._prepared_student: nn.Module | None = None
        self._said: set[str] = set()
        self._start_terms()
        self._prepare_distillation()

    # ---- Settings ----

    @property
    def dkd_args(self) -> DKDArgumentsMixin:
        """The distillation settings: `args`, or the defaults where `args` has no such fields."""
        return self.args if isinstance(self.args, DKDArgumentsMixin) else DKDArgumentsMixin()

    @property
    def head(self) -> Head | None:
        """The kind of the student's head, from `dkd_head` or its architecture."""
        return Head(self.dkd_args.dkd_head) if self.dkd_args.dkd_head else head_of(self._student)

    @property
    def _student(self) -> Any:
        # `self.model` may be None for a type checker alone.
        return self.model

    @property
    def _known_head(self) -> Head:
        head = self.head
        if head is None:
            raise ValueError(
                f"{type(bare_model(self._student)).__name__} is not known to emit class or token logits. Set dkd_head "
                f"to say how its labels stand beside its logits: one of {', '.join(Head)}."
            )
        return head

    @property
    def _the_teacher(self) -> Teacher:
        assert self.teacher is not None
        return self.teacher

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

    def _load_teacher(self, teacher: nn.Module | str | os.PathLike | Teacher | None) -> Teacher | None:
        settings = self.dkd_args
        path = settings.teacher_model_name_or_path
        if teacher is not None and path is not None:
            raise ValueError(f"A teacher was passed and teacher_model_name_or_path is {path!r}: give one of the two.")
        teacher = path if teacher is None else teacher
        if isinstance(teacher, str | os.PathLike):
            keywords: Any = settings.teacher_model_init_kwargs or {}
            revision = settings.teacher_model_revision
            return Teacher.from_pretrained(teacher, self._student, revision=revision, **keywords)
        if isinstance(teacher, nn.Module):
            return Teacher(teacher)
        if isinstance(teacher, Teacher | None):
            return teacher
        raise TypeError(f"teacher is a {type(teacher).__name__}; expected a module, a path or Hub id, or a Teacher.")

    def _prepare_distillation(self) -> None:
        """Check that teacher and student go together, and place the teacher; once for each student."""
        if self.teacher is None or self._prepared_student is self.model:
            return
        self._refuse_what_cannot_be_distilled()
        self.teacher.prepare(self._student, self.args.device)
        order = None
        if self._known_head.has_named_classes:
            names, names_of_teacher = class_names_of(self._student), self.teacher.class_names
            order = rows.class_order(names, names_of_teacher)
            if names and names_of_teacher and len(names) != len(names_of_teacher):
                raise ValueError(rows.other_classes(self._known_head, len(names), len(names_of_teacher)))
            if names and len(names) == 2 and self.dkd_args.distillation == "dkd" and self.dkd_args.dkd_beta > 0:
                self._say(
                    "Two classes: NCKD is 0, since only one class is not the target, and dkd_beta does nothing. DKD is "
                    "then classical distillation weighed by dkd_alpha."
                )
        if order is not None:
            self._say("Reordered the teacher's classes by name to the student's order.")
        self._class_order = None if order is None else torch.tensor(order, device=self.args.device)
        self._signature_columns = None
        self._prepared_student = self.model

    def _refuse_what_cannot_be_distilled(self) -> None:
        config = getattr(self._student, "config", None)
        if self._known_head is Head.CLASSIFICATION and getattr(config, "num_labels", 2) == 1:
            raise ValueError("The student has num_labels=1, a regression head. Distilling needs at least two classes.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"Distillation does not run under torch.nn.DataParallel ({self.args.n_gpu} GPUs in one process). Start "
                f"one process for each: accelerate launch --num_processes {self.args.n_gpu} your_script.py"
            )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("Distillation does not run with context or sequence parallelism, which split the rows.")

    def _say(self, message: str) -> None:
        """Log once, on the main process, at a level that shows without any logging set-up."""
        if self.is_world_process_zero() and message not in self._said:
            logger.warning(message)
        self._said.add(message)

    # ---- Batches ----

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that only the teacher reads, and `teacher_` ones, when Trainer removes unused columns."""
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh and self.teacher is not None and self._signature_columns is not None:
            columns = self.teacher.columns
            main_input = getattr(self._student, "main_input_name", "input_ids")
            self._signature_columns += [*columns, *(TEACHER_PREFIX + name for name in [*columns, main_input])]

    def _student_columns(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs` without what only the teacher reads."""
        student_class: Any = type(bare_model(self._student))
        named = _named_inputs(student_class)
        of_teacher = set(self.teacher.columns) if self.teacher is not None and named & set(inputs) else set()
        keep = named | set(self.label_names)
        dropped = {
            name for name in inputs if name not in keep and (name in of_teacher or name.startswith(TEACHER_PREFIX))
        }
        return {name: value for name, value in inputs.items() if name not in dropped}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Trainer's, with N, our count of labelled rows in the optimizer step over all data-parallel processes."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._rescales(batches):
            return batches, count
        counts = [rows.count_labelled(self._known_head, batch, self.label_names).to(device) for batch in batches]
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

        `num_items_in_batch` is N, the labelled rows of the optimizer step; without it, those of the micro-batch.
        """
        self._prepare_distillation()
        student_inputs = self._student_columns(inputs)
        if not self._rescales([inputs]):
            self.loss_is_scaled_for_ga = self._parents_scaling
            return super().compute_loss(
                model, student_inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        # Read by `training_step`, which then does not divide by the accumulation steps.
        self.loss_is_scaled_for_ga = True
        if self._evaluating:
            loss, outputs = self._task_loss(model, student_inputs, num_items_in_batch)
        else:
            loss, outputs = self._distillation_loss(model, inputs, student_inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any], total: Tensor | int | None) -> tuple[Tensor, Any]:
        """The parent's loss on this batch alone, as Trainer computes it on one process."""
        count = None
        if total is not None or self.compute_loss_func is not None:
            # Trainer's own count, which is not ours for GPT-2: equal numbers are comparable numbers.
            labels = inputs.get("labels")
            if labels is None:
                count = rows.count_labelled(self._known_head, inputs, self.label_names)
            elif inputs.get("shift_labels") is not None:
                count = inputs["shift_labels"].ne(rows.IGNORE_INDEX).sum()
            else:
                count = (labels[..., 1:] if self._loss_shifts_labels else labels).ne(rows.IGNORE_INDEX).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=count)
        multiplied = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return (loss / self._data_parallel_size if multiplied and count is not None else loss), outputs

    def _distillation_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], student_inputs: dict[str, Any], total: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        settings, head = self.dkd_args, self._known_head
        count = rows.count_labelled(head, inputs, self.label_names)
        scale = objective.step_scale(
            count if total is None else total, 1 if total is None else self._data_parallel_size
        )
        distils = self.teacher is not None and settings.distils
        # Before the student's forward, so that the teacher's activations are gone when the student's are there.
        teacher_rows = self._teacher_rows(inputs) if distils else None
        hard, outputs = self._hard_loss(model, student_inputs, count, scale, total)
        if self.teacher is None:
            return self._for_training_step(hard, total), outputs

        loss = settings.ce_weight * hard if settings.ce_weight else torch.zeros_like(hard)
        terms = {"ce": hard, "dkd": torch.zeros_like(hard)}
        if teacher_rows is not None:
            self._weight = settings.dkd_weight(
                self.state.global_step + 1, self.state.max_steps, self._steps_per_epoch()
            )
            aligned = self._side_by_side(outputs, teacher_rows, f"At step {self.state.global_step + 1}")
            sums = objective.distillation_sums(aligned, settings)
            terms |= {name: scale * value for name, value in sums.named().items()}
            terms["dkd"] = self._weight * terms["dkd"]
            loss = loss + terms["dkd"]
        self._record(terms, loss)
        return self._for_training_step(loss, total), outputs

    def _hard_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        count: Tensor,
        scale: Tensor | float,
        total: Tensor | int | None,
    ) -> tuple[Tensor, Any]:
        """The parent's loss as the micro-batch's share of the step, and the student's outputs."""
        head, own_function = self._known_head, self.compute_loss_func is not None
        if own_function:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=total)
            return (loss if total is not None else objective.share_of_step(loss, count, scale)), outputs
        inputs = rows.with_some_label(head, inputs, count, self.label_names)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if head is Head.QUESTION_ANSWERING and _is_loss_of(outputs, loss):
            # The head averages starts and ends apart, so that a window without one would weigh the other double.
            labels = rows.aligned_labels(head, inputs)
            return objective.cross_entropy_sum(rows.logits_of(outputs, "student", head), labels) * scale, outputs
        return objective.share_of_step(loss, count, scale), outputs

    def _record(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        """Add the terms of a micro-batch to the running ones, as Trainer does with the loss."""
        if not self._terms:
            self._first_step = self.state.global_step
        counts = loss.detach().isfinite() if self.args.logging_nan_inf_filter else True
        self._terms.add(terms, counts, steps=self.state.global_step - self._first_step)

    def _teacher_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        # A teacher in half precision runs in its own: autocast to the other one cannot mix the two.
        with self.accelerator.autocast(AutocastKwargs(enabled=self._the_teacher.dtype == torch.float32)):
            return self._the_teacher.logits(inputs)

    def _teacher_rows(self, inputs: Mapping[str, Any], logits: Tensor | None = None) -> TeacherRows:
        """The teacher's rows at the labels of `inputs`; its logits are computed unless they are given."""
        head = self._known_head
        labels = rows.aligned_labels(head, inputs, self.label_names)
        positions = rows.labelled_positions(head, labels)
        visible = inputs.get("attention_mask") if head is Head.QUESTION_ANSWERING else None
        logits = self._teacher_logits(inputs) if logits is None else logits
        taken = rows.rows_at(logits, labels, positions, "teacher", visible)
        # Before the student's own loss fails on them with less to say.
        rows.check_labels(labels, taken.shape[1])
        return TeacherRows(taken, labels, positions, visible, self._the_teacher.columns_in(inputs))

    def _side_by_side(self, outputs: Any, teacher: TeacherRows, moment: str) -> rows.Rows:
        """The student's rows beside the teacher's, over the same classes and checked."""
        head, (teacher_rows, labels, positions, visible, columns) = self._known_head, teacher
        logits = rows.logits_of(outputs, "student", head)
        student_rows = rows.rows_at(logits, labels, positions, "student", visible)
        labels = labels.flatten() if positions is None else labels.flatten().index_select(0, positions)
        aligned = rows.aligned_rows(head, student_rows, teacher_rows, labels, self._class_order)
        if aligned.student.shape[1] < max(student_rows.shape[1], teacher_rows.shape[1]):
            self._say(
                f"Vocabularies of {student_rows.shape[1]} (student) and {teacher_rows.shape[1]} (teacher) rows: only "
                f"the {aligned.student.shape[1]} that they share are distilled, the others are taken for padding."
            )
        self._teacher_check.update(
            objective.unusable_teacher(aligned), objective.masking_student(aligned), moment, columns
        )
        return aligned

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

    def _start_terms(self) -> None:
        self._terms = objective.RunningTerms()
        self._teacher_check = TeacherCheck()
        self._weight = 1.0
        self._first_step = 0
