"""Evaluation with Trainer's own loop: exact sums on any number of processes, and the teacher beside the student."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from . import cached_teacher, classes, objective, rows
from .distillation import DistillationTraining
from .heads import Head


class DistillationEvaluation(DistillationTraining):
    """The evaluating half of `DKDMixin`: the student's own task loss, exact on any number of processes (but for float
    labels, whose examples that fill up the last batch are in it, as in Trainer).

    Trainer's loop does the work. The teacher runs only for `eval_with_teacher` or for metrics that want its logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._eval_terms = objective.RunningTerms()
        self._pairs_predictions = False
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, with the teacher's terms where `eval_with_teacher` asks for them."""
        self.dkd_args.check_distillation()
        if self.gather_function == self.accelerator.gather:
            # Seq2SeqTrainer's choice keeps the examples that fill up the last batch of several processes, and on one
            # process lets a partial last batch weigh as much as a whole one.
            self.gather_function = self.accelerator.gather_for_metrics
        # `compute_metrics` may evaluate once more, within this loop.
        outer = self._eval_terms, self._pairs_predictions
        self._eval_terms = objective.RunningTerms()
        self._pairs_predictions = self._metrics_want_teacher()
        try:
            with _teacher_logits_for_metrics(self) if self._pairs_predictions else nullcontext():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
                )
            if self._eval_terms:
                self._teacher_check.raise_if_bad(wait=True)
                metrics: Any = output.metrics
                sums = self._eval_terms.drain(self.accelerator, "sum")
                counts = {"teacher_accuracy": sums.pop("labelled")}
                count = sums.pop("count")
                for name, total in sums.items():
                    if rows_of_term := counts.get(name, count):
                        metrics[f"{metric_key_prefix}_{name}"] = total / rows_of_term
            return _student_predictions_only(output) if self._pairs_predictions else output
        finally:
            self._eval_terms, self._pairs_predictions = outer

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
        labelled = self.head is not None and rows.has_labels(self.head, inputs, self.label_names)
        counted = _real_examples(self.accelerator, inputs)
        if labelled and counted is not None:
            inputs = rows.without_labels_from(self._known_head, inputs, counted, self.label_names)
        with self._in_evaluation(), _last_output(model) as outputs:
            loss, logits, labels = super().prediction_step(
                model, self._student_columns(inputs), prediction_loss_only, ignore_keys=ignore_keys, **kwargs
            )
        # Without labels an encoder-decoder teacher could not run.
        chosen = self._teacher_labels and not self._encoder_decoder
        wanted = self.dkd_args.eval_with_teacher and (labelled or chosen)
        with_terms = wanted and cached_teacher.has_outputs(self, inputs)
        # Without labels no metrics are computed.
        self._pairs_predictions = self._pairs_predictions and labelled and cached_teacher.has_logits(self, inputs)
        with_logits = self._pairs_predictions and logits is not None
        if with_terms or with_logits:
            teacher_logits = self._teacher_logits(inputs) if cached_teacher.has_logits(self, inputs) else None
            if with_terms:
                self._add_eval_terms(inputs, outputs[0], teacher_logits, counted)
            if with_logits and teacher_logits is not None:
                ordered: Any = classes.in_order(teacher_logits, self._class_order)
                # Start and end logits apart, as the student's: along the first dimension stand the examples.
                apart = tuple(ordered) if self.head is Head.QUESTION_ANSWERING else ordered
                return loss, (logits, apart), labels
        return loss, logits, labels

    @torch.no_grad()
    def _add_eval_terms(
        self, inputs: Mapping[str, Any], outputs: Any, teacher_logits: Tensor | None, counted: int | None
    ) -> None:
        moment = f"In evaluation after step {self.state.global_step}"
        teacher_rows = self._teacher_rows(inputs, teacher_logits)
        if counted is not None and (teacher_rows.weights is not None or teacher_rows.by_teacher is not None):
            # Neither a number for each class nor a missing label can say that an example does not count.
            teacher_rows.labels[counted:] = rows.IGNORE_INDEX
            if teacher_rows.by_teacher is not None:
                teacher_rows.by_teacher[counted:] = False
        aligned = self._side_by_side(outputs, teacher_rows)
        share = objective.distil(aligned, self.dkd_args)
        self._check_teacher(share, teacher_rows.columns, moment)
        parts = {name: value for name, value in share.terms.items() if name not in ("ce", "dkd")}
        distilled = aligned.labels != rows.IGNORE_INDEX
        labelled = distilled if aligned.by_teacher is None else distilled & ~aligned.by_teacher
        hits = aligned.teacher_hits() & labelled
        self._eval_terms.add(
            {
                **parts,
                "teacher_accuracy": hits.sum() / aligned.per_example,
                "count": distilled.sum() / aligned.per_example,
                "labelled": labelled.sum() / aligned.per_example,
            }
        )

    def _metrics_want_teacher(self) -> bool:
        wanted = "teacher_logits" in self.args.include_for_metrics and self.compute_metrics is not None
        return self.teacher is not None and wanted

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False


def _real_examples(accelerator: Accelerator, batch: Mapping[str, Any]) -> int | None:
    """How many examples of this process's batch belong to the data set; None where all of them do.

    The last batches of several processes are filled up with examples from the start of the data set. Trainer drops what
    it gathers of those, but a loss averaged over the batch has them in it.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    size = find_batch_size(batch)
    return min(max(state.remainder - accelerator.process_index * size, 0), size)


@contextmanager
def _last_output(model: nn.Module) -> Iterator[list[Any]]:
    """A list that holds the output of the last forward of `model`: with generation that is the one with labels."""
    outputs: list[Any] = [None]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[0] = output

    handle = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _teacher_logits_for_metrics(trainer: Any) -> Iterator[None]:
    """Let predictions be pairs (student's, teacher's) in the loop, and give `compute_metrics` them apart.

    `compute_metrics` finds the teacher's in `EvalPrediction.teacher_logits`; `preprocess_logits_for_metrics` gets the
    student's alone.
    """
    compute_metrics, preprocess = trainer.compute_metrics, trainer.preprocess_logits_for_metrics

    def preprocess_student(logits: Any, labels: Any) -> Any:
        student, *teacher = logits if trainer._pairs_predictions else (logits,)
        student = student if preprocess is None else preprocess(student, labels)
        return (student, *teacher) if teacher else student

    def compute_with_teacher(prediction: EvalPrediction, **kwargs: Any) -> dict[str, Any]:
        student, teacher = _split_predictions(prediction.predictions)
        apart: Any = EvalPrediction(student, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
        apart.teacher_logits = teacher
        # It may evaluate once more, with the script's own functions.
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = compute_metrics, preprocess
        try:
            return compute_metrics(apart, **kwargs)
        finally:
            trainer.compute_metrics = compute_with_teacher
            trainer.preprocess_logits_for_metrics = preprocess_student

    trainer.preprocess_logits_for_metrics = preprocess_student
    trainer.compute_metrics = compute_metrics and compute_with_teacher
    try:
        yield
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = compute_metrics, preprocess


def _student_predictions_only(output: EvalLoopOutput) -> EvalLoopOutput:
    """The loop's output without the teacher's half of the predictions."""
    if output.predictions is None:
        return output
    return output._replace(predictions=_split_predictions(output.predictions)[0])


def _split_predictions(pairs: Any) -> tuple[Any, Any]:
    """Predictions that are pairs, or with `eval_do_concat_batches=False` a list of pairs → (student's, teacher's)."""
    if isinstance(pairs, list):
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return pairs[0], pairs[1]
