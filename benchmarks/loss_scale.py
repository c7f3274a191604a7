"""Does the gradient depend on how a batch is split? Stock `Trainer` beside `DKDTrainer` without a teacher.

    python -m benchmarks.loss_scale

One optimizer step over the same 8 examples, as one batch of 8 and as 4 micro-batches of 2. The norm of the gradient
over that of the model's own loss on all 8 should be 1 (https://github.com/huggingface/transformers/issues/47688).
"""

import logging
import tempfile
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import set_verbosity_error

from hf_dkd import DKDTrainer
from tests.distributed.splits import NAMES, KeepGradients, examples, models


def gradient(trainer_class: type[Trainer], name: str, batch_size: int, accumulation: int) -> torch.Tensor:
    """The gradient of one optimizer step over the eight examples, as one vector."""
    keep: Any = KeepGradients()
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential", max_grad_norm=0.0, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        data: Any = examples(name)
        trainer = trainer_class(models(name)[0], args, train_dataset=data, callbacks=[keep])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return torch.cat([part.flatten() for part in keep.gradients.values()])


def true_gradient(name: str) -> torch.Tensor:
    """The gradient of the model's own loss over all eight examples."""
    model, data = models(name)[0], examples(name)
    model.train()
    model(**{column: torch.stack([example[column] for example in data]) for column in data[0]}).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    set_verbosity_error()
    logging.getLogger("hf_dkd").setLevel(logging.ERROR)
    print(f"{'':<14}{'Trainer, 8':>12}{'Trainer, 4 × 2':>16}{'DKDTrainer, 4 × 2':>19}")
    for name in NAMES:
        expected = true_gradient(name).norm()
        runs = gradient(Trainer, name, 8, 1), gradient(Trainer, name, 2, 4), gradient(DKDTrainer, name, 2, 4)
        ratios = [(run.norm() / expected).item() for run in runs]
        print(f"{name:<14}{ratios[0]:>12.4f}{ratios[1]:>16.4f}{ratios[2]:>19.4f}")


if __name__ == "__main__":
    main()
