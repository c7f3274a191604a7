"""The training half of `DKDMixin`: teacher and student side by side in `compute_loss`. No tensor math."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from . import cached_teacher, classes, objective, rows, targets
from .heads import Head
from .language_model import LanguageModelDistillation
from .losses.truncated import TopOutputs
from .teacher_check import TeacherCheck


class TeacherRows(NamedTuple):
    """The teacher's half of a micro-batch, and what is needed to take the student's rows at the same places."""

    rows: Tensor | TopOutputs
    labels: Tensor
    visible: Tensor | None
    weights: Tensor | None
    by_teacher: Tensor | None
    columns: list[str]


class Scales(NamedTuple):
    """The rows of a micro-batch, and what sums over them are multiplied by to be its share of the step's mean."""

    number_labelled: Tensor
    number_distilled: Tensor
    labelled: Tensor | float
    distilled: Tensor | float


def _is_loss_of(outputs: Any, loss: Tensor) -> bool:
    """Whether `loss` is the one that the model itself computed."""
    first = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0] if isinstance(outputs, tuple) else None
    return first is loss


class DistillationTraining(LanguageModelDistillation):
    """Counts the labelled rows of an optimizer step, and computes a micro-batch's share of the objective over them."""

    _checked_mixed = False
    _distilled_in_step: Tensor | None = None
    # Set by `prediction_step`: what `compute_loss` returns is then the task loss alone.
    _evaluating = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parents_scaling = getattr(self, "loss_is_scaled_for_ga", None)
        self._start_terms()

    # ---- Counts ----

    @property
    def _data_parallel_size(self) -> int:
        # The engines average gradients over processes, so that a sum over processes is multiplied by their number.
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _rescales(self, batches: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the loss of `batches` is divided by our count of rows rather than by Trainer's rule."""
        if self.teacher is not None or any(self._mixed(batch) is not None for batch in batches):
            return True
        if self.args.n_gpu > 1 or (self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1):
            return False
        head = self.head
        return head is not None and all(rows.has_labels(head, batch, self.label_names) for batch in batches)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Trainer's, with N, our count of labelled rows in the optimizer step over all data-parallel processes."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches[:1]:
            self._settle_problem_type(batch)
        if not self._rescales(batches):
            return batches, count
        totals = sum(
            (self._counts(batch).to(device) for batch in batches), torch.zeros(2, dtype=torch.long, device=device)
        )
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.gather(totals.unsqueeze(0)).sum(0) // self.get_tp_size()
        # A step without any label is a sum of zeros, whatever it is divided by.
        labelled, self._distilled_in_step = totals.clamp(min=1)
        return batches, labelled

    def _counts(self, batch: Mapping[str, Any]) -> Tensor:
        """The labelled rows of a batch, and the distilled ones, (2,): those that the teacher labels too."""
        if not self._teacher_labels:
            return rows.count_labelled(self._known_head, batch, self.label_names).expand(2)
        labels, chosen = self._distilled(batch)
        return torch.stack(((labels != rows.IGNORE_INDEX).sum(), chosen.sum()))

    @property
    def _teacher_labels(self) -> bool:
        """Whether rows without a label are distilled."""
        return self.teacher is not None and self.dkd_args.dkd_target == "teacher" and self.dkd_args.distils

    def _distilled(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        mask = "decoder_attention_mask" if self._encoder_decoder else "attention_mask"
        of_tokens = self._known_head.has_vocabulary or self._known_head is Head.TOKEN_CLASSIFICATION
        if of_tokens and batch.get(mask) is None and rows.has_labels(self._known_head, batch, self.label_names):
            self._say(
                f'dkd_target is "teacher", but without {mask} only the labels tell text from padding: tokens without a '
                "label are not distilled."
            )
        return targets.distilled(self._known_head, batch, self.label_names, self._encoder_decoder)

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
        self._settle_problem_type(inputs)
        self._prepare_distillation()
        self._check_mixed(inputs)
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
            arguments = model, inputs, student_inputs, num_items_in_batch
            loss, outputs = self._distillation_loss(*arguments, whole_outputs=return_outputs)
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any], total: Tensor | int | None) -> tuple[Tensor, Any]:
        """The parent's loss on this batch alone, as Trainer computes it on one process."""
        if self._mixes_here(inputs):
            loss, outputs = self._mixed_loss(model, inputs)
            loss = loss / rows.count_labelled(self._known_head, inputs, self.label_names)
            return loss, (loss, *outputs) if isinstance(outputs, tuple) else outputs
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
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        student_inputs: dict[str, Any],
        total: Tensor | int | None,
        whole_outputs: bool = False,
    ) -> tuple[Tensor, Any]:
        """The share of the objective and the student's outputs, which a subclass may ask for with all they hold."""
        settings = self.dkd_args
        scales = self._scales(inputs, total)
        if self.teacher is None or not settings.distils:
            hard, outputs = self._hard_loss(model, student_inputs, scales, total)
            loss = hard if self.teacher is None else settings.ce_weight * hard
            terms = {"ce": hard, "dkd": torch.zeros_like(hard)}
        else:
            self._weight = settings.dkd_weight(
                self.state.global_step + 1, self.state.max_steps, self._steps_per_epoch()
            )
            if whole_outputs and settings.use_fused_linear == "always":
                raise ValueError(
                    'use_fused_linear is "always", but a subclass asks compute_loss for outputs, which hold logits: '
                    'set it to "auto".'
                )
            trial = None if whole_outputs else self._settled_trial(model, inputs, student_inputs)
            if trial is not None and trial.head is not None:
                share, outputs = self._fused_share(model, inputs, student_inputs, trial.head, scales.labelled)
                self._check_teacher(share, self._the_teacher.columns_in(inputs))
                loss, terms = share.loss, {name: scales.labelled * value for name, value in share.terms.items()}
            else:
                spared = trial is not None and trial.plain_loss and not settings.dkd_standardize
                loss, terms, outputs = self._loss_of_logits(model, inputs, student_inputs, scales, total, spared)
        if self.teacher is not None:
            self._record(terms, loss)
        return self._for_training_step(loss, total), outputs

    def _scales(self, inputs: Mapping[str, Any], total: Tensor | int | None) -> Scales:
        count, distilled = self._counts(inputs).unbind()
        processes = 1 if total is None else self._data_parallel_size
        in_step = None if total is None else self._distilled_in_step
        of_labels = objective.step_scale(count if total is None else total, processes)
        of_distilled = objective.step_scale(*((distilled, 1) if in_step is None else (in_step, processes)))
        return Scales(count, distilled, of_labels, of_distilled if self._teacher_labels else of_labels)

    def _loss_of_logits(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        student_inputs: dict[str, Any],
        scales: Scales,
        total: Tensor | int | None,
        spared: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """The objective from the logits of both models, its terms, and the outputs of the student, which may be spared
        its own loss.
        """
        settings = self.dkd_args
        # Before the student's forward, so that the teacher's activations are gone when the student's are there.
        teacher_rows = self._teacher_rows(inputs)
        if spared:
            hard, outputs = self._hard_loss_apart(model, student_inputs, teacher_rows, scales)
        else:
            hard, outputs = self._hard_loss(model, student_inputs, scales, total)
        aligned = self._side_by_side(outputs, teacher_rows)
        share = objective.distil(
            aligned,
            settings,
            weight=self._weight,
            ce_weight=settings.ce_weight if hard is None else None,
            scale=scales.distilled,
        )
        self._check_teacher(share, teacher_rows.columns)
        loss, terms = share.loss, {name: scales.distilled * value for name, value in share.terms.items()}
        if hard is not None:
            terms["ce"] = hard
            loss = settings.ce_weight * hard + loss if settings.ce_weight else loss
        if self._teacher_labels:
            terms["teacher_targets"] = scales.distilled * (scales.number_distilled - scales.number_labelled)
        return loss, terms, outputs

    def _hard_loss_apart(
        self, model: nn.Module, student_inputs: dict[str, Any], teacher: TeacherRows, scales: Scales
    ) -> tuple[Tensor | None, Any]:
        """Outputs of a student that need not compute its loss, and the loss, or None: the pass over rows finds it."""
        outputs = model(**self._without_labels(student_inputs))
        logits = rows.logits_of(outputs, "student")
        if logits.shape[-1] <= cached_teacher.number_of_classes(self._the_teacher, teacher.rows):
            return None, outputs
        # That pass sees only the classes that both have.
        return objective.cross_entropy_sum(logits, teacher.labels) * scales.labelled, outputs

    def _hard_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        scales: Scales,
        total: Tensor | int | None,
    ) -> tuple[Tensor, Any]:
        """The parent's loss as the micro-batch's share of the step, and the student's outputs."""
        count, scale = scales.number_labelled, scales.labelled
        head, own_function = self._known_head, self.compute_loss_func is not None
        if self._teacher_labels and not rows.has_labels(head, inputs, self.label_names):
            outputs = model(**inputs)
            return torch.zeros((), device=count.device), outputs
        if own_function:
            # Trainer counts the numbers in the labels, of which such an example has one for each class.
            weights = rows.class_weights(head, inputs, self.label_names)
            total = total if total is None or weights is None else total * weights.shape[1]
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=total)
            return (loss if total is not None else objective.share_of_step(loss, count, scale)), outputs
        if self._mixes_here(inputs):
            loss, outputs = self._mixed_loss(model, inputs)
            return loss * scale, outputs
        inputs = rows.with_some_label(head, inputs, count, self.label_names)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if head is Head.QUESTION_ANSWERING and _is_loss_of(outputs, loss):
            # The head averages starts and ends apart, so that a window without one would weigh the other double.
            labels = rows.aligned_labels(head, inputs)
            return objective.cross_entropy_sum(rows.logits_of(outputs, "student", head), labels) * scale, outputs
        return objective.share_of_step(loss, count, scale), outputs

    def _check_mixed(self, inputs: Mapping[str, Any]) -> None:
        """Check the shares of mixed examples: on a CPU always, elsewhere once, since it waits for the device."""
        weights = self._mixed(inputs)
        if weights is not None and (weights.device.type == "cpu" or not self._checked_mixed):
            classes.check_mixed(weights)
            self._checked_mixed = True

    def _mixes_here(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the hard loss is ours: of mixed examples, unless the script or a parent trainer brings its own."""
        return not self._parent_computes_loss and self.compute_loss_func is None and self._mixed(inputs) is not None

    def _mixed_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The cross-entropy of mixed examples, summed, and the student's outputs."""
        (name,) = rows.label_columns(self._known_head, self.label_names)
        outputs = model(**{key: value for key, value in inputs.items() if key != name})
        logits = rows.logits_of(outputs, "student", self.head)
        return objective.mixed_cross_entropy_sum(logits, inputs[name], self.args.label_smoothing_factor), outputs

    def _record(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        """Add the terms of a micro-batch to the running ones, as Trainer does with the loss."""
        if not self._terms:
            self._first_step = self.state.global_step
        counts = loss.detach().isfinite() if self.args.logging_nan_inf_filter else True
        self._terms.add(terms, counts, steps=self.state.global_step - self._first_step)

    def _teacher_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        with self._teacher_autocast():
            return self._the_teacher.logits(inputs)

    def _teacher_rows(self, inputs: Mapping[str, Any], logits: Tensor | None = None) -> TeacherRows:
        """The teacher's rows of `inputs` that are distilled; its logits are computed unless they are given."""
        head, by_teacher = self._known_head, None
        if self._teacher_labels:
            labels, chosen = self._distilled(inputs)
            by_teacher = chosen & (labels == rows.IGNORE_INDEX)
            # Any class takes the place of the teacher's, which is known once the classes are aligned.
            labels = labels.masked_fill(by_teacher, 0)
        else:
            labels = rows.aligned_labels(head, inputs, self.label_names)
        classes.check_one_label(head, labels)
        visible = inputs.get("attention_mask") if head is Head.QUESTION_ANSWERING else None
        columns = self._the_teacher.columns_in(inputs)
        top = cached_teacher.top_rows(inputs, labels)
        if top is not None:
            return TeacherRows(top, labels, visible, None, by_teacher, columns)
        logits = self._teacher_logits(inputs) if logits is None else logits
        taken = rows.rows_beside(labels, logits, "teacher", visible)
        # Before the student's own loss fails on them with less to say.
        classes.check_labels(labels, taken.shape[1])
        weights = rows.class_weights(head, inputs, self.label_names)
        classes.check_weights(head, weights, taken)
        return TeacherRows(taken, labels, visible, weights, by_teacher, columns)

    def _side_by_side(self, outputs: Any, teacher: TeacherRows) -> classes.Rows:
        """The student's rows beside the teacher's, over the same classes."""
        head, (teacher_rows, labels, visible, weights, by_teacher, _) = self._known_head, teacher
        logits = rows.logits_of(outputs, "student", head)
        if isinstance(teacher_rows, TopOutputs):
            return cached_teacher.aligned_rows(self._the_teacher, logits, teacher_rows, labels)
        student_rows = rows.rows_beside(labels, logits, "student", visible)
        aligned = classes.aligned_rows(head, student_rows, teacher_rows, labels.flatten(), self._class_order, weights)
        if by_teacher is not None:
            aligned = classes.labelled_by_teacher(aligned, by_teacher.flatten())
        if head.has_vocabulary and student_rows.shape[1] != teacher_rows.shape[1]:
            self._say_what_is_shared(student_rows.shape[1], teacher_rows.shape[1])
        return aligned

    def _check_teacher(self, share: objective.Distilled, columns: list[str], moment: str | None = None) -> None:
        moment = moment or f"At step {self.state.global_step + 1}"
        self._teacher_check.update(share.unusable_teacher, share.masking_student, moment, columns)

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
        self._tried = None
        self._checked_mixed = False
        self._distilled_in_step = None
        self._first_step = 0
