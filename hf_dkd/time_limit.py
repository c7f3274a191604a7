"""Training in slices, for a machine that is lent for minutes or may be taken away."""

import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# To agree on the time is a wait for all processes and their devices.
_STEPS_BETWEEN_LOOKS = 10


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a training in `output_dir` that is whole; None where there is none.

    `transformers.trainer_utils.get_last_checkpoint` also returns one whose writing was interrupted, from which no
    training resumes: `trainer_state.json` is what Trainer writes last.
    """
    steps = {
        int(file.parent.name.removeprefix("checkpoint-")): file
        for file in Path(output_dir).glob("checkpoint-*/trainer_state.json")
        if file.parent.name.removeprefix("checkpoint-").isdecimal()
    }
    for _, file in sorted(steps.items(), reverse=True):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # empty, cut off, or deleted by the run that trains there
            continue
        return str(file.parent)
    return None


def stop_script(told: str) -> NoReturn:
    """End all processes of a script together, after one line about it.

    Raises:
        SystemExit: with code 0.
    """
    processes = PartialState()
    if processes.is_main_process:
        print(told, flush=True)
    processes.wait_for_everyone()
    processes.destroy_process_group()
    raise SystemExit(0)


class TimeLimit(TrainerCallback):
    """Writes a checkpoint once the time is over, and ends the script; training resumes from there when started again.

    The optimizer step that runs then is finished, of several processes up to nine more, and so is the evaluation of an
    epoch.

    Args:
        minutes: from the making of this callback, above 0.

    Raises:
        ValueError: for minutes that are not above 0.
        SystemExit: out of `Trainer.train`, with code 0, once the checkpoint is written.
    """

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"the time limit is {minutes} minutes; expected a number above 0.")
        self.end = time.monotonic() + 60 * minutes
        self.over = False

    def is_over(self) -> bool:
        """Whether the time is over; of several processes, which must all ask, the main one's clock tells."""
        over = [time.monotonic() >= self.end]
        if PartialState().num_processes > 1:
            broadcast_object_list(over)
        return over[0]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # After the last step of an epoch its evaluation comes first: no run that resumes there would make up for it.
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if not ends_epoch and (args.world_size == 1 or state.global_step % _STEPS_BETWEEN_LOOKS == 0):
            self._look(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look(state, control)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        if self.is_over() and state.global_step < state.max_steps:
            self.over = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.over:
            stop_script(
                f"Out of time at step {state.global_step} of {state.max_steps}: the same command goes on from there."
            )
