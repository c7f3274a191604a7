"""Images per second of `recipes/paper_cifar100.py` beside a bare PyTorch loop, and a step of DKD beside one of KD.

    python -m benchmarks.paper_step [--bf16] [--compile]

- bare loop: both models, the textbook's DKD and cross-entropy, SGD and the same batches; nothing is logged
- DKDTrainer: what the recipe runs, with its logging
- DKDTrainer, kd: the same with classical distillation

Batches of 64 images of 32 pixels, which lie on the device: a GPU, if there is one. They take turns of a few steps each,
in one process, with models of their own; the first steps of a turn are not timed.
"""

import logging
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, PrinterCallback, TrainerCallback
from transformers.utils.logging import set_verbosity_error

from hf_dkd.device_images import DeviceImages, as_it_is

from . import measure, report
from .textbook import textbook_dkd_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from cifar_models import config_of
from paper_options import PaperTrainingArguments
from paper_presets import PAIRS
from paper_trainer import PaperTrainer, settle_compilation

BATCH_SIZE, UNTIMED_STEPS = 64, 3
BARE, OURS, OURS_KD = "bare loop", "DKDTrainer", "DKDTrainer, kd"


def wait(device: torch.device) -> float:
    """The time, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def models(pair: str) -> tuple[Any, Any]:
    """Student and teacher."""
    torch.manual_seed(0)
    teacher, student = (
        AutoModelForImageClassification.from_config(config_of(name))
        for name in (PAIRS[pair].teacher, PAIRS[pair].student)
    )
    return student, teacher.eval().requires_grad_(False)


def images(steps: int, device: torch.device) -> DeviceImages:
    # The last batch is smaller, as with the 50,000 images of CIFAR-100.
    pixels = torch.randint(256, (steps * BATCH_SIZE - 48, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(100, (len(pixels),))
    views: dict[str, Any] = {"padding": 4, "mirror": True}
    return DeviceImages(pixels, labels, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), device=device, **views)


class BareLoop:
    """A training loop without a trainer."""

    def __init__(self, pair: str, data: DeviceImages, device: torch.device, bf16: bool, compiled: bool) -> None:
        self.beta, self.data, self.device = PAIRS[pair].beta, data, device
        student, teacher = (model.to(device) for model in models(pair))
        self.student: nn.Module = torch.compile(student) if compiled else student
        self.teacher: nn.Module = torch.compile(teacher) if compiled else teacher
        self.optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        self.cast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def seconds(self) -> float:
        """Of a timed step, in a turn over the data."""
        self.student.train()
        for number, indices in enumerate(torch.randperm(len(self.data)).split(BATCH_SIZE)):
            if number == UNTIMED_STEPS:
                start = wait(self.device)
            batch = self.data.__getitems__(indices.tolist())
            with self.cast:
                with torch.inference_mode():
                    teacher_logits = self.teacher(batch["pixel_values"]).logits.float()
                logits = self.student(batch["pixel_values"]).logits.float()
            loss = cross_entropy(logits, batch["labels"]) + textbook_dkd_loss(
                logits, teacher_logits, batch["labels"], alpha=1.0, beta=self.beta, temperature=4.0
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return (wait(self.device) - start) / (number + 1 - UNTIMED_STEPS)


class Clock(TrainerCallback):
    """The seconds of the timed steps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start, self.end = device, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == UNTIMED_STEPS:
            self.start = wait(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.end = wait(self.device)


class OurTrainer:
    """The recipe's trainer."""

    def __init__(
        self, pair: str, data: DeviceImages, device: torch.device, bf16: bool, compiled: bool, output: str, **given: Any
    ) -> None:
        args = PaperTrainingArguments(
            output, pair=pair, max_steps=math.ceil(len(data) / BATCH_SIZE), eval_strategy="no", save_strategy="no",
            bf16=bf16, torch_compile=compiled, teacher_compile=compiled, use_cpu=device.type == "cpu", report_to="none",
            disable_tqdm=True, **given,
        )  # fmt: skip
        student, teacher = models(pair)
        self.clock, self.steps = Clock(device), args.max_steps - UNTIMED_STEPS
        self.trainer = PaperTrainer(
            student, args, data_collator=as_it_is, train_dataset=data, callbacks=[self.clock], teacher=teacher
        )
        self.trainer.remove_callback(PrinterCallback)

    def seconds(self) -> float:
        self.trainer.train()
        return (self.clock.end - self.clock.start) / self.steps


def main() -> None:
    parser = report.options(__doc__, repeats=5)
    parser.add_argument("--steps", type=int, default=None, help="of each turn (on a GPU 200, otherwise 13)")
    parser.add_argument("--pairs", nargs="+", default=["resnet56-resnet20", "resnet32x4-resnet8x4"])
    parser.add_argument("--bf16", action="store_true", help="both models in bfloat16, the loss in float32")
    parser.add_argument("--compile", action="store_true", help="both models under torch.compile")
    arguments = parser.parse_args()
    set_verbosity_error()
    logging.getLogger("hf_dkd").setLevel(logging.ERROR)

    settle_compilation()  # as in the recipe
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = images(arguments.steps or (200 if device.type == "cuda" else 13), device)
    sections, measured, goals = {}, {}, []
    for pair in arguments.pairs:
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as output:
            shared = pair, data, device, arguments.bf16, arguments.compile
            turns: dict[str, Any] = {
                BARE: BareLoop(*shared),
                OURS: OurTrainer(*shared, output),
                OURS_KD: OurTrainer(*shared, output, distillation="kd"),
            }
            times: dict[str, list[float]] = {name: [] for name in turns}
            for repeat in range(arguments.repeats + 1):
                for name in list(turns)[:: -1 if repeat % 2 else 1]:
                    seconds = turns[name].seconds()
                    if repeat:
                        times[name].append(seconds)
        speeds = {name: measure.spread([BATCH_SIZE / value for value in seconds]) for name, seconds in times.items()}
        sections[f"{pair}, batches of {BATCH_SIZE}"] = report.times_table(
            times, [BARE, OURS_KD], {"images/s": [report.ranged(one) for one in speeds.values()]}
        )
        measured[pair] = {"seconds": times}
        goals.append(
            report.Goal(f"{pair}: images/s over the bare loop's", measure.ratios(times, BARE, OURS), 0.8, True)
        )
        goals.append(report.Goal(f"{pair}: step of DKD over that of KD", measure.ratios(times, OURS, OURS_KD), 1.05))
    sections["Goals"] = report.goals_table(goals)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    how = f"{name}, {'bf16' if arguments.bf16 else 'fp32'}{', compiled' if arguments.compile else ''}"
    sections = {f"{how}: {title}": body for title, body in sections.items()}
    report.write(arguments.output_dir, "paper_step", sections, measured | {"device": how})


if __name__ == "__main__":
    main()
