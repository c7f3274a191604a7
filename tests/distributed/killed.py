"""A run that is killed in the middle of an optimizer step. `python -m tests.distributed.killed OUTPUT_DIR STEP NAME`"""

import os
import signal
import sys
from typing import Any

from transformers import TrainerCallback

from hf_dkd import DKDTrainer, DKDTrainingArguments
from tests.models import ARCHITECTURES


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(output_dir: str, name: str) -> DKDTrainer:
    """Twelve steps, four an epoch, with dropout, accumulation and warm-up.

    The checkpoints after steps 3, 6 and 9 lie within an epoch, so that resuming must skip the batches already seen.
    """
    args = DKDTrainingArguments(
        output_dir, num_train_epochs=3, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        learning_rate=1e-2, save_strategy="steps", save_steps=3, logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, dkd_beta=2.0, dkd_temperature=2.0, dkd_warmup_steps=8,
    )  # fmt: skip
    architecture = ARCHITECTURES[name]
    student = architecture.model(seed=0, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    batch = architecture.batch()
    examples = [{name: column[row] for name, column in batch.items()} for row in range(8)]
    return DKDTrainer(student, args, train_dataset=examples, teacher=architecture.model(seed=1))


if __name__ == "__main__":
    killed = trainer(sys.argv[1], sys.argv[3])
    killed.add_callback(KillAt(int(sys.argv[2])))
    killed.train()
