"""The part of `DKDMixin` for language models: the loss from hidden states, or cross-entropy from the same pass."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from . import classes, objective, rows
from .heads import Head, bare_model
from .language_head import LanguageHead, Trial, first_tokens, language_head, tried
from .losses.fused_linear import fused_rows
from .preparation import DistillationSetup


class LanguageModelDistillation(DistillationSetup):
    """Spares a language model its own loss, where that is plain cross-entropy, and where it can both models' logits."""

    _tried: Trial | None = None
    _head_of_teacher: LanguageHead | None = None
    # The warm-up weight of the step.
    _weight = 1.0

    @property
    def _encoder_decoder(self) -> bool:
        return bool(getattr(self._config, "is_encoder_decoder", False)) and self._known_head is Head.LM

    def _teacher_autocast(self) -> Any:
        if self._the_teacher.dtype == torch.float32:
            return self.accelerator.autocast()
        # A teacher in half precision runs in its own: autocast to the other one cannot mix the two.
        return self.accelerator.autocast(AutocastKwargs(enabled=False))

    @property
    def _parent_computes_loss(self) -> bool:
        """Whether a parent trainer has a `compute_loss` of its own."""
        return getattr(super().compute_loss, "__func__", None) is not Trainer.compute_loss

    def _settled_trial(self, model: nn.Module, inputs: Mapping[str, Any], student_inputs: dict[str, Any]) -> Trial:
        """What a few tokens through both models showed; tried once for each student."""
        if self._tried is None:
            self._tried = self._try_out(model, inputs, student_inputs)
            reason, wanted = self._tried.reason, self.dkd_args.use_fused_linear
            if self._tried.head is None and wanted == "always":
                raise ValueError(f'use_fused_linear is "always", and cannot be: {reason}.')
            if self._tried.head is None and wanted == "auto" and self._known_head.has_vocabulary:
                self._say(f"The fused linear loss is not used: {reason}.")
        return self._tried

    def _try_out(self, model: nn.Module, inputs: Mapping[str, Any], student_inputs: dict[str, Any]) -> Trial:
        reason = self._why_the_hard_loss_differs(student_inputs)
        if reason is not None:
            return Trial(None, False, reason)
        tokens, half_precision = first_tokens(student_inputs), self.accelerator.mixed_precision != "no"
        labels = rows.aligned_labels(self._known_head, tokens, self.label_names)
        without = self._without_labels(tokens)
        trial = tried(model, language_head(self._student), tokens, labels, without, half_precision)
        if trial.head is None:
            return trial
        reason = self._why_logits_are_needed()
        if reason is None:
            with self._teacher_autocast():
                of_teacher = self._the_teacher.trial(first_tokens(inputs), half_precision)
            self._head_of_teacher = of_teacher.head
            reason = f"of the teacher, {of_teacher.reason}" if of_teacher.head is None else None
        return trial if reason is None else Trial(None, trial.plain_loss, reason)

    def _why_the_hard_loss_differs(self, student_inputs: Mapping[str, Any]) -> str | None:
        """Why the hard loss is not what a language model of transformers computes of its logits."""
        if not self._known_head.has_vocabulary or "input_ids" not in student_inputs:
            return "the student is no language model that reads input_ids"
        if self._parent_computes_loss or self.compute_loss_func is not None or self.label_smoother is not None:
            return "the hard-label loss is not the model's own"
        if hasattr(self._student, "_orig_mod") or self.args.torch_compile:
            return "the student is compiled"
        if self._encoder_decoder and not hasattr(bare_model(self._student), "prepare_decoder_input_ids_from_labels"):
            return "the student does not make decoder_input_ids of labels"
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self._student.modules()):
            return "the student has batch statistics, which a trial would change"
        if self.dkd_args.dkd_target == "teacher":
            return 'dkd_target is "teacher", which distils other rows than those with a label'
        return None

    def _why_logits_are_needed(self) -> str | None:
        settings, state = self.dkd_args, self.accelerator.state
        if settings.use_fused_linear == "never":
            return 'use_fused_linear is "never"'
        if settings.dkd_top_k or settings.dkd_standardize:
            return f"{'dkd_top_k' if settings.dkd_top_k else 'dkd_standardize'} looks at whole rows of logits"
        if self._the_teacher.is_compiled:
            return "the teacher is compiled"
        if is_deepspeed_zero3_enabled():
            return "ZeRO-3 has the teacher's weights only within its own forward"
        if self.is_fsdp_enabled and getattr(state.fsdp_plugin, "fsdp_version", 1) == 1:
            return "FSDP 1 flattens the weights: take FSDP 2"
        if self.get_tp_size() > 1 or self.is_model_parallel:
            return "a model is spread over several devices"
        return None

    def _without_labels(self, student_inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the student reads where its own loss is not wanted."""
        names = {*rows.label_columns(self._known_head, self.label_names), "shift_labels"}
        kept = {name: value for name, value in student_inputs.items() if name not in names}
        if self._encoder_decoder:
            # Both follow from labels, where the model gets them.
            kept["use_cache"] = False
            if "decoder_input_ids" not in kept and "decoder_inputs_embeds" not in kept:
                prepare: Any = bare_model(self._student).prepare_decoder_input_ids_from_labels
                kept["decoder_input_ids"] = prepare(labels=student_inputs["labels"])
        return kept

    def _fused_share(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        student_inputs: dict[str, Any],
        student: LanguageHead,
        scale: Tensor | float,
    ) -> tuple[objective.Distilled, Any]:
        """The objective from the hidden states of both models, made within the student's forward, and its outputs."""
        settings, teacher = self.dkd_args, self._head_of_teacher
        assert teacher is not None
        labels = rows.aligned_labels(self._known_head, inputs, self.label_names)
        with self._teacher_autocast():
            hidden_of_teacher = self._the_teacher.hidden_states(inputs, teacher)
        weights = objective.row_weights(settings, self._weight, settings.ce_weight)
        found: list[objective.Distilled] = []

        def at_the_head(hidden: Tensor) -> None:
            heads = student.weights(), teacher.weights()
            self._check_vocabularies(len(heads[0].weight), len(heads[1].weight), labels)
            student_rows = rows.rows_beside(labels, hidden, "student")
            teacher_rows = rows.rows_beside(labels, hidden_of_teacher, "teacher")
            loss, terms = fused_rows(
                student_rows, heads[0], teacher_rows, heads[1], labels.flatten(), weights, scale=scale
            )
            found.append(objective.distilled(loss, terms, settings))

        with student.handing_over(at_the_head):
            outputs = model(**self._without_labels(student_inputs))
        return found[0], outputs

    def _check_vocabularies(self, of_student: int, of_teacher: int, labels: Tensor) -> None:
        if of_student != of_teacher:
            if not classes.differ_in_padding(of_student, of_teacher):
                raise ValueError(classes.other_classes(self._known_head, of_student, of_teacher))
            self._say_what_is_shared(of_student, of_teacher)
        classes.check_labels(labels, min(of_student, of_teacher))

    def _say_what_is_shared(self, of_student: int, of_teacher: int) -> None:
        self._say(
            f"Vocabularies of {of_student} (student) and {of_teacher} (teacher) rows: only the "
            f"{min(of_student, of_teacher)} that they share are distilled, the others are taken for padding."
        )
