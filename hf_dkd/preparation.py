"""The first part of `DKDMixin`: the settings, the teacher, and what each of the two models is given."""

import inspect
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from . import classes, rows
from .cached_teacher import check_cache, with_cached_outputs
from .data import DataCollatorForMixup
from .heads import Head, bare_model, head_of
from .teacher import TEACHER_PREFIX, Teacher, class_names_of
from .training_args import DKDArgumentsMixin

logger = logging.getLogger(__name__)


@lru_cache
def _named_inputs(model_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class DistillationSetup(_Trainer):
    """Loads and places the teacher, refuses what cannot be distilled, and tells which columns each model reads."""

    teacher: Teacher | None = None

    def __init__(
        self, *args: Any, teacher: nn.Module | str | os.PathLike | Teacher | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = with_cached_outputs(self, self._load_teacher(teacher))
        self._class_order: Tensor | None = None
        self._prepared_student: nn.Module | None = None
        self._said: set[str] = set()
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

    def _settle_problem_type(self, batch: Mapping[str, Any]) -> None:
        """Take labels with a number for each class as several labels, as the heads of transformers do unless told."""
        if self.teacher is None or self.dkd_args.dkd_head is not None or self.head is not Head.CLASSIFICATION:
            return
        config = self._config
        if getattr(config, "problem_type", "") is not None or config.num_labels < 2:
            return
        weights = rows.class_weights(Head.CLASSIFICATION, batch, self.label_names)
        if weights is None:
            return
        if not ((weights == 0) | (weights == 1)).all():
            raise ValueError(
                "The labels have a number for each class, not all of them 0 or 1, and config.problem_type is None. Set "
                'it on the student: "single_label_classification" for mixed examples, "multi_label_classification" for '
                "several labels each."
            )
        config.problem_type = "multi_label_classification"
        self._say("Labels with a 0 or 1 for each class: taken for several labels per example.")
        if self.label_smoother is not None:
            self._say("label_smoothing_factor has no meaning for several labels per example: it is switched off.")
            self.label_smoother = None
        self._prepared_student = None

    def _mixed(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The class weights of mixed examples, which no head of transformers takes; None where they have labels."""
        told = getattr(self._config, "problem_type", None)
        mixes = told == "single_label_classification" or (told is None and self.dkd_args.dkd_head is not None)
        mixes = mixes and self.head is Head.CLASSIFICATION
        return rows.class_weights(Head.CLASSIFICATION, batch, self.label_names) if mixes else None

    @property
    def _config(self) -> Any:
        return getattr(bare_model(self._student), "config", None)

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
        self.teacher.prepare(self._student, self.args.device, self.dkd_args.teacher_compile)
        order = None
        if self._known_head.has_named_classes:
            names, names_of_teacher = class_names_of(self._student), self.teacher.class_names
            order = classes.class_order(names, names_of_teacher)
            if names and names_of_teacher and len(names) != len(names_of_teacher):
                raise ValueError(classes.other_classes(self._known_head, len(names), len(names_of_teacher)))
            if self._known_head is Head.MULTI_LABEL:
                self._check_without_nckd("Several labels per example, each a two-class problem")
            elif names and len(names) == 2:
                self._check_without_nckd("Two classes")
            self._refuse_impossible_groups(len(names) if names else None)
        if order is not None:
            self._say("Reordered the teacher's classes by name to the student's order.")
        check_cache(self.teacher, self._known_head, self.dkd_args, order)
        self._class_order = None if order is None else torch.tensor(order, device=self.args.device)
        self._signature_columns = None
        self._prepared_student = self.model

    def _refuse_contradicting_kinds(self) -> None:
        told, problem = self.dkd_args.dkd_head, getattr(self._config, "problem_type", None)
        contradicting = {
            Head.CLASSIFICATION: "multi_label_classification",
            Head.MULTI_LABEL: "single_label_classification",
        }
        if told is not None and contradicting.get(Head(told)) == problem and problem is not None:
            raise ValueError(
                f"dkd_head is {told!r} and the student's config.problem_type {problem!r}: they contradict."
            )

    def _check_without_nckd(self, why: str) -> None:
        settings = self.dkd_args
        if settings.distillation == "kd" or not settings.dkd_beta:
            return
        if not settings.dkd_alpha and not settings.ce_weight:
            raise ValueError(f"{why}: NCKD is 0, and dkd_alpha and ce_weight are 0 too: nothing would be trained.")
        self._say(
            f"{why}: NCKD is 0, since only one class is not the target, and dkd_beta does nothing. DKD is then "
            "classical distillation weighed by dkd_alpha."
        )

    def _refuse_impossible_groups(self, number: int | None) -> None:
        settings = self.dkd_args
        if self._known_head is Head.MULTI_LABEL and (settings.dkd_top_k or settings.dkd_standardize):
            name = "dkd_top_k" if settings.dkd_top_k else "dkd_standardize"
            raise ValueError(
                f"{name} is set for a multi-label head, where each label is a problem of two classes: there is nothing "
                "to rank or to standardise among them. Leave it out."
            )
        if number is not None and settings.dkd_top_k >= number:
            raise ValueError(
                f"dkd_top_k is {settings.dkd_top_k} for {number} classes; expected less, so that some are left."
            )
        if number is not None and settings.dkd_standardize and number < 3:
            raise ValueError("dkd_standardize is set for two classes, whose z-scores tell only which one is larger.")

    def _refuse_what_cannot_be_distilled(self) -> None:
        if self._known_head is Head.CLASSIFICATION and getattr(self._config, "num_labels", 2) == 1:
            raise ValueError("The student has num_labels=1, a regression head. Distilling needs at least two classes.")
        if self._known_head is Head.CLASSIFICATION and getattr(self._config, "problem_type", None) == "regression":
            raise ValueError('The student\'s config.problem_type is "regression". Distilling needs classes.')
        self._refuse_contradicting_kinds()
        if self._known_head is Head.QUESTION_ANSWERING and self.dkd_args.dkd_target == "teacher":
            raise ValueError(
                'dkd_target is "teacher" for a question answering head, whose windows without an answer have none '
                'to choose: set it to "label".'
            )
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

    def get_train_dataloader(self) -> Any:
        """Trainer's, with the training half of a collator that has one, such as `DataCollatorForMixup`."""
        collator = self.data_collator
        if isinstance(collator, DataCollatorForMixup) and self.head is Head.CLASSIFICATION:
            problem = getattr(self._config, "problem_type", None)
            if problem != "single_label_classification" and self.dkd_args.dkd_head is None:
                raise ValueError(
                    f"The collator mixes examples and the student's config.problem_type is {problem!r}: set it to "
                    '"single_label_classification", which tells shares of classes from several labels.'
                )
        self.data_collator = getattr(collator, "for_training", collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    # ---- Columns ----

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
