"""What evaluation needs beside Trainer's own loop: exact sums on any number of processes, and the teacher's logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput


def real_examples(accelerator: Accelerator, batch: Mapping[str, Any]) -> int | None:
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
def last_output(model: nn.Module) -> Iterator[list[Any]]:
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
def teacher_logits_for_metrics(trainer: Trainer) -> Iterator[None]:
    """Let predictions be pairs (student's, teacher's) in the loop, and give `compute_metrics` them apart.

    `compute_metrics` finds the teacher's in `EvalPrediction.teacher_logits`; `preprocess_logits_for_metrics` gets the
    student's alone.
    """
    compute_metrics, preprocess = trainer.compute_metrics, trainer.preprocess_logits_for_metrics

    def preprocess_student(logits: tuple[Any, Tensor], labels: Any) -> tuple[Any, Tensor]:
        return (logits[0] if preprocess is None else preprocess(logits[0], labels)), logits[1]

    def compute_with_teacher(prediction: EvalPrediction, **kwargs: Any) -> dict[str, Any]:
        student, teacher = split_predictions(prediction.predictions)
        apart = EvalPrediction(student, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
        apart.teacher_logits = teacher
        return compute_metrics(apart, **kwargs)

    trainer.preprocess_logits_for_metrics = preprocess_student
    trainer.compute_metrics = compute_metrics and compute_with_teacher
    try:
        yield
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = compute_metrics, preprocess


def student_predictions_only(output: EvalLoopOutput) -> EvalLoopOutput:
    """The loop's output without the teacher's half of the predictions."""
    return (
        output if output.predictions is None else output._replace(predictions=split_predictions(output.predictions)[0])
    )


def split_predictions(pairs: Any) -> tuple[Any, Any]:
    """Predictions that are pairs, or with `eval_do_concat_batches=False` a list of pairs → (student's, teacher's)."""
    if isinstance(pairs, list):
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return pairs[0], pairs[1]
