"""Caches written, and training on them, by however many processes run this. A script for `accelerate launch`."""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import load_from_disk

from hf_dkd import DKDTrainer, DKDTrainingArguments, cache_shards, cache_teacher_outputs
from tests.cache_helpers import rows_of
from tests.models import ARCHITECTURES

SETTINGS: dict[str, dict[str, Any]] = {"bert": {}, "llama": {}, "llama top k": {"top_k": 64}}


def write(name: str, folder: Path, **settings: Any) -> Any:
    """The 16 rows of an architecture in four shards or more."""
    with patch.object(cache_shards, "_SHARD_BATCHES", 2):
        return cache_teacher_outputs(
            ARCHITECTURES[name].model(seed=1), rows_of(name, seeds=2), folder, batch_size=2, dtype="float32", **settings
        )


def train(name: str, data: Any, output: Path, teacher: Any, batch_size: int) -> dict[str, Any]:
    """The weights after six steps over eight examples each, and what is evaluated of five."""
    args = DKDTrainingArguments(
        str(output), max_steps=6, per_device_train_batch_size=batch_size, per_device_eval_batch_size=2, optim="sgd",
        learning_rate=0.02, lr_scheduler_type="constant", eval_with_teacher=True, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    student = ARCHITECTURES[name].model(seed=0)
    evaluated = data if hasattr(data, "select") else None
    trainer = DKDTrainer(student, args, train_dataset=data, teacher=teacher)
    trainer.train()
    metrics = trainer.evaluate(evaluated.select(range(5))) if evaluated is not None else {}
    return {
        "world_size": args.world_size,
        "weights": torch.cat([parameter.detach().flatten() for parameter in student.parameters()]),
        "metrics": {key: metrics[key] for key in ("eval_tckd", "eval_nckd", "eval_loss") if key in metrics},
    }


def main() -> None:
    output = Path(sys.argv[1])
    results = {}
    for case, settings in SETTINGS.items():
        name = case.split()[0]
        data = write(name, output / case, **settings)
        results[case] = train(name, data, output, None, batch_size=4)
        results[case, "stream"] = train(name, data.to_iterable_dataset(), output, None, batch_size=4)
        results[case, "again"] = train(name, load_from_disk(str(output / case)), output, None, batch_size=4)
    if PartialState().is_main_process:
        torch.save(results, output / "results.pt")
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # as in splits.py


if __name__ == "__main__":
    main()
