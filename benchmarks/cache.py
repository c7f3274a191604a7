"""What a cache of teacher outputs costs: the training step, the bytes of an example, and how fast it is written.

    python -m benchmarks.cache

Steps of `DKDTrainer` on a cache, and with the live teacher, over those of plain `Trainer` on the same data: one
process, the three in turn, the median step of each run; of the ratios the median, the lowest and the highest.
Written with a teacher that costs nothing, so that the rows per second are those of ranking, checking and writing, and
from a stream, to see that memory does not grow with the data.
"""

import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.utils.logging import disable_progress_bar
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from transformers.utils.logging import set_verbosity_error

from hf_dkd import DKDTrainer, DKDTrainingArguments, cache_teacher_outputs

from . import measure, report

LENGTH = 256
# Name, vocabulary or classes, batch, k: what is trained.
STEPS = [
    ("classifier, 1,000 classes", 1000, 16, None),
    ("language model, 32k, k = 64", 32_000, 2, 64),
    ("language model, 152k, k = 64", 151_936, 2, 64),
]
CORPUS = 1e12
STREAMED = 20_000, 80_000


def bert(layers: int, classes: int) -> Any:
    config = BertConfig(
        hidden_size=256, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=1024, num_labels=classes
    )
    return BertForSequenceClassification(config)


def llama(layers: int, vocabulary: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=512, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=4, intermediate_size=1536, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def rows(count: int, length: int, vocabulary: int, classes: int | None = None) -> Dataset:
    random = np.random.default_rng(0)
    ids = random.integers(0, vocabulary, (count, length))
    labels = ids if classes is None else random.integers(0, classes, count)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels})


class StepTimes(TrainerCallback):
    """Seconds between the ends of steps, so with the loading of the batch; the first two steps are left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        return statistics.median(np.diff(self.ends)[1:])


def step_seconds(
    trainer_class: type[Trainer], model: Any, data: Dataset, batch: int, steps: int, **given: Any
) -> float:
    times = StepTimes()
    with tempfile.TemporaryDirectory() as output:
        args = DKDTrainingArguments(
            output, max_steps=steps + 2, per_device_train_batch_size=batch, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trainer_class(model, args, train_dataset=data, callbacks=[times], **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times.median()


def steps_table(repeats: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    print(f"{'step over that of plain Trainer':<34}{'cached':>22}{'live teacher':>24}{'plain, s':>10}")
    table = []
    for name, classes, batch, k in STEPS:
        make, data = llama, rows(16, LENGTH, classes)
        if k is None:
            make, data = bert, rows(64, LENGTH, 30_000, classes)
        torch.manual_seed(0)
        student, teacher = make(6, classes), make(12, classes)
        cached = cache_teacher_outputs(teacher, data, folder / name, top_k=k, batch_size=batch)
        runs: dict[str, list[float]] = {"plain": [], "cached": [], "live": []}
        for _ in range(repeats):
            runs["plain"].append(step_seconds(Trainer, student, data, batch, steps))
            runs["cached"].append(step_seconds(DKDTrainer, student, cached, batch, steps))
            runs["live"].append(step_seconds(DKDTrainer, student, data, batch, steps, teacher=teacher))
        row: dict[str, Any] = {"step": name, "plain_seconds": statistics.median(runs["plain"])}
        for kind in ("cached", "live"):
            ratios = [one / plain for one, plain in zip(runs[kind], runs["plain"], strict=True)]
            row[kind] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "ratios": ratios}
        table.append(row)
        shown = [f"{r['median']:.3f} ({r['low']:.3f}–{r['high']:.3f})" for r in (row["cached"], row["live"])]
        print(f"{name:<34}{shown[0]:>22}{shown[1]:>24}{row['plain_seconds']:>10.3f}", flush=True)
    return table


class Constant(nn.Module):
    """A teacher that emits the same logits for every batch, at no cost."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits[: len(input_ids)]


def write_seconds(folder: Path, data: Dataset | IterableDataset, logits: Tensor, **settings: Any) -> float:
    start = time.perf_counter()
    head = "causal_lm" if logits.ndim == 3 else "classification"
    cache_teacher_outputs(Constant(logits), data, folder, batch_size=len(logits), head=head, **settings)
    return time.perf_counter() - start


def storage_table(folder: Path) -> list[dict[str, Any]]:
    print(f"{'classes':>8}  {'kept':<16}{'bytes a row':>12}{'rows/s':>12}{'10^12 rows':>14}{'process-days':>14}")
    table = []
    random = torch.Generator().manual_seed(0)
    for classes in (1000, 32_000, 151_936):
        of_tokens = classes > 1000
        length, batch, batches = (LENGTH, 2, 5) if of_tokens else (1, 256, 65)
        logits = 3 * torch.randn(batch, *([length] if of_tokens else []), classes, generator=random)
        data = rows(batch * batches, length, classes, None if of_tokens else classes)
        choices: list[dict[str, Any]] = [{"dtype": "float16"}, {"dtype": "float32"}]
        for settings in choices[: 1 if of_tokens else 2] + [{"top_k": k} for k in (16, 64, 256) if of_tokens]:
            kept = " ".join(f"{name} {value}" for name, value in settings.items())
            whole, first = folder / f"{classes}-{kept}", folder / f"{classes}-{kept}-first"
            # What happens once (the fingerprint, the first batch) is in both.
            seconds = write_seconds(whole, data, logits, **settings)
            seconds -= write_seconds(first, data.select(range(batch)), logits, **settings)
            size = sum(file.stat().st_size for file in whole.glob("*.arrow"))
            inputs = sum(column.nbytes for column in data.data.columns)
            row_count = batch * (length - 1 if of_tokens else 1)
            size_of_row, rate = (size - inputs) / (row_count * batches), row_count * (batches - 1) / seconds
            table.append({"classes": classes, "kept": kept, "bytes": size_of_row, "rows_per_second": rate})
            days = CORPUS / rate / 86_400
            print(
                f"{classes:>8,}  {kept:<16}{size_of_row:>12,.1f}{rate:>12,.0f}{size_of_row * CORPUS / 1e12:>11,.0f} TB"
                f"{days:>14,.0f}",
                flush=True,
            )
            shutil.rmtree(whole)
    return table


def write_streamed(count: int) -> None:
    """Cache `count` examples of 1,000 classes that exist one at a time."""

    def examples() -> Iterator[dict[str, Any]]:
        for number in range(count):
            yield {"input_ids": [number], "attention_mask": [1], "labels": number % 1000}

    logits = torch.zeros(256, 1000)
    with tempfile.TemporaryDirectory() as folder:
        write_seconds(Path(folder), IterableDataset.from_generator(examples), logits, dtype="float32")


def memory_table() -> list[dict[str, Any]]:
    """Bytes that the process needs of its own while it writes a stream."""
    table = []
    for count in STREAMED:
        peak = measure.in_fresh_process("benchmarks.cache", "--memory", str(count))
        table.append({"rows": count, "written": 4_000 * count, "peak_memory": peak})
        print(f"{count:>8,} rows of a stream: {peak / 1e6:.1f} MB of memory for {4_000 * count / 1e6:.0f} MB of logits")
    return table


def in_markdown(
    steps: list[dict[str, Any]], storage: list[dict[str, Any]], memory: list[dict[str, Any]]
) -> dict[str, str]:
    """The tables, and the goal."""

    def ratio(row: dict[str, Any], kind: str) -> str:
        return report.ranged(measure.Spread(*(row[kind][name] for name in ("median", "low", "high"))))

    of_steps = [[row["step"], f"{row['plain_seconds']:.2f}", ratio(row, "cached"), ratio(row, "live")] for row in steps]
    of_rows = [
        [
            f"{row['classes']:,}",
            row["kept"],
            f"{row['bytes']:,.0f}",
            f"{row['rows_per_second']:,.0f}",
            f"{row['bytes']:,.0f} TB",
            f"{CORPUS / row['rows_per_second'] / 86_400:,.0f}",
        ]
        for row in storage
    ]
    of_memory = [
        [f"{row['rows']:,}", f"{row['written'] / 1e6:.0f}", f"{row['peak_memory'] / 1e6:.1f}"] for row in memory
    ]
    goals = [report.Goal(f"{row['step']}: step with a cache / plain", row["cached"]["ratios"], 1.05) for row in steps]
    return {
        "Steps": report.table(["", "plain Trainer, s", "cached / plain", "live teacher / plain"], of_steps),
        "Storage": report.table(["classes", "kept", "bytes a row", "rows/s", "10^12 rows", "process-days"], of_rows),
        "Memory": report.table(["rows of a stream", "logits written, MB", "peak memory, MB"], of_memory),
        "Goals": report.goals_table(goals),
    }


def main() -> None:
    parser = report.options(__doc__, repeats=5)
    parser.add_argument("--steps", type=int, default=6, help="of each run (6)")
    given = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()
    logging.getLogger("hf_dkd").setLevel(logging.ERROR)
    if given.memory:
        print(measure.peak_own_memory(lambda: write_streamed(int(given.memory))))
        return
    with tempfile.TemporaryDirectory() as folder:
        storage = storage_table(Path(folder))
        steps = steps_table(given.repeats, given.steps, Path(folder))
    memory = memory_table()
    facts = {"steps": steps, "storage": storage, "memory": memory}
    report.write(given.output_dir, "cache", in_markdown(steps, storage, memory), facts)


if __name__ == "__main__":
    main()
