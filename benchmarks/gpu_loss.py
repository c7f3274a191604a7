"""The GPU kernels of the DKD loss, forward and backward on logits, beside what else computes a loss on logits.

    python -m benchmarks.gpu_loss

- kernel: `hf_dkd.losses.triton_kernels`; kernel + CE: with the cross-entropy at T = 1 from the same pass
- textbook: the formula with autograd in float32, `benchmarks/textbook.py`; compiled: under `torch.compile`
- cross_entropy: `torch.nn.functional.cross_entropy` on the student's logits, without any distillation
- Liger KL, Liger JSD: Liger-Kernel's kernels of KL and (at beta 0, again KL) JSD after `log_softmax` of both models
- TRL: `ChunkedDivergenceFunction`, which reads no logits: from hidden states of width 64, its projections included

Each case is timed with CUDA events, in turns, the L2 cache flushed before each call. The share is of the bandwidth of a
plain copy, if student and teacher were read and the gradient written once.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

import hf_dkd

from . import measure, report
from .textbook import textbook_dkd_loss

VOCABULARIES = 1_000, 32_000, 65_536, 128_256, 151_936
SETTINGS = {"alpha": 1.0, "beta": 2.0, "temperature": 2.0}
KERNEL, COMPILED = "kernel", "textbook, compiled"
TRL_WIDTH = 64


def cases_at(rows: int, classes: int, dtype: torch.dtype, device: str) -> dict[str, measure.Case]:
    """The cases at (N, C): functions that give (loss, gradient)."""
    from hf_dkd.losses.row_pass import Weights
    from hf_dkd.losses.triton_kernels import row_pass, scale_gradient_

    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.empty(rows, classes, dtype=dtype, device=device).normal_(0, 2, generator=generator) for _ in range(2)
    )
    labels = torch.randint(classes, (rows,), generator=generator, device=device)
    one = torch.ones((), device=device)

    def kernel(ce_weight: float) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(student)
        weights = Weights(**SETTINGS, ce_weight=ce_weight or None)
        terms = row_pass(student, teacher, labels, weights, scale=1 / rows, gradient=gradient)
        loss = (terms.dkd + ce_weight * terms.ce).mean()
        scale_gradient_(gradient, one)  # what backward calls, with the gradient of the loss
        return loss, gradient

    def with_gradient(loss_of: Callable[[Tensor], Tensor]) -> measure.Case:
        def run() -> tuple[Tensor, Tensor]:
            logits = student.detach().requires_grad_()
            loss = loss_of(logits)
            return loss.detach(), torch.autograd.grad(loss, logits)[0]

        return run

    def textbook(logits: Tensor) -> Tensor:
        return textbook_dkd_loss(logits.float(), teacher.float(), labels, **SETTINGS)

    cases = {
        KERNEL: partial(kernel, 0.0),
        f"{KERNEL} + CE": partial(kernel, 1.0),
        "textbook": with_gradient(textbook),
        COMPILED: with_gradient(torch.compile(textbook, dynamic=False)),
        "cross_entropy": with_gradient(lambda logits: cross_entropy(logits, labels)),
    }
    cases |= {name: with_gradient(loss) for name, loss in liger_losses(teacher).items()}
    return cases | trl_case(rows, classes, dtype, device)


def liger_losses(teacher: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Liger-Kernel's divergences from the student's logits; none where it is not installed."""
    try:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    except ImportError:
        return {}

    def log_probs(logits: Tensor) -> Tensor:
        return log_softmax(logits / SETTINGS["temperature"], dim=1, dtype=torch.float32)

    kl, jsd = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerJSD(beta=0.0)
    return {
        "Liger KL": lambda logits: kl(log_probs(logits), log_probs(teacher)),
        "Liger JSD": lambda logits: jsd(log_probs(logits), log_probs(teacher)),
    }


def trl_case(rows: int, classes: int, dtype: torch.dtype, device: str) -> dict[str, measure.Case]:
    """TRL's chunked divergence, forward KL; none where it is not installed."""
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        return {}
    hidden = [torch.randn(rows, TRL_WIDTH, dtype=dtype, device=device) for _ in range(2)]
    weights = [torch.randn(classes, TRL_WIDTH, dtype=dtype, device=device) for _ in range(2)]
    leaves = hidden[0].requires_grad_(), weights[0].requires_grad_()

    def run() -> Any:
        divergence, _ = ChunkedDivergenceFunction.apply(
            hidden[0], weights[0], None, hidden[1], weights[1], None, 0.0, SETTINGS["temperature"]
        )
        return torch.autograd.grad(divergence.mean(), leaves)

    return {"TRL": run}


def check_agreement(device: str, dtype: torch.dtype, rows: int = 8, classes: int = 5_000) -> None:
    """Raise an `AssertionError` unless the kernels and the textbook give one loss and gradient."""
    cases = cases_at(rows, classes, dtype, device)
    (loss, gradient), (expected_loss, expected) = cases[KERNEL](), cases["textbook"]()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0.0)
    gradient, expected = gradient.float(), expected.float()
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=2 * torch.finfo(dtype).eps, atol=atol)


def seconds(cases: dict[str, measure.Case], repeats: int) -> dict[str, list[float]]:
    """Seconds on the GPU of each case, once per repeat; the cases take turns."""
    flushed = torch.empty(2**30, dtype=torch.uint8, device="cuda")  # far beyond any L2, and time for the host to queue
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-2, repeats):  # two rounds to compile and to fill the allocator
        for name in list(cases)[:: -1 if repeat % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            start.record()
            cases[name]()
            end.record()
            end.synchronize()
            if repeat >= 0:
                times[name].append(start.elapsed_time(end) / 1000)
    return times


def peak_extra_memory(case: measure.Case) -> int:
    """Bytes allocated at most by a call."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def section(times: dict[str, list[float]], copy: list[float], memory: dict[str, float]) -> str:
    """A row for each case: milliseconds, the time over the kernel's, the share of the copy bandwidth, peak memory."""
    rows = [
        [
            name,
            report.milliseconds(values),
            report.ranged(measure.spread(measure.ratios(times, name, KERNEL))),
            report.ranged(measure.spread(shares(values, copy))),
            f"{memory[name]:.2f}",
        ]
        for name, values in times.items()
    ]
    return report.table(["", "ms", f"/ {KERNEL}", "share of copy", "peak memory, logits tensors"], rows)


def shares(values: list[float], copy: list[float]) -> list[float]:
    """The bandwidth over that of a copy, which moves two logits tensors where a loss moves three."""
    return [3 / 2 * one / value for value, one in zip(values, copy, strict=True)]


def goals_of(shape: str, times: dict[str, list[float]], copy: list[float]) -> list[report.Goal]:
    ahead_of = [name for name in times if name == COMPILED or name.startswith(("Liger", "TRL"))]
    return [
        report.Goal(f"{shape}: share of the copy bandwidth", shares(times[KERNEL], copy), 0.8, at_least=True),
        *(report.Goal(f"{shape}: time over {name}", measure.ratios(times, KERNEL, name), 1.0) for name in ahead_of),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="how often each case is timed (20)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"), help="for the table and the JSON")
    parser.add_argument("--elements", type=int, default=2**28, help="logits of each model, rows × classes (2^28)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_loss measures GPU kernels and needs a CUDA device; PyTorch sees none here.")
    sections: dict[str, str] = {}
    measured: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "hf_dkd": hf_dkd.__version__}
    goals: list[report.Goal] = []
    for dtype in (torch.bfloat16, torch.float32):
        check_agreement("cuda", dtype)
        for classes in VOCABULARIES:
            torch.compiler.reset()  # or the tenth shape would exceed the limit of recompilations
            rows = arguments.elements // classes
            shape = f"{rows:,} × {classes:,}, {str(dtype).removeprefix('torch.')}"
            source = torch.zeros(rows, classes, dtype=dtype, device="cuda")
            cases = cases_at(rows, classes, dtype, "cuda")
            times = seconds(cases | {"copy": source.clone}, arguments.repeats)
            memory = {name: peak_extra_memory(case) / source.nbytes for name, case in cases.items()}
            copy = times.pop("copy")
            gigabytes = 2 * source.nbytes / measure.spread(copy).median / 1e9
            sections[shape] = f"Copy: {gigabytes:,.0f} GB/s.\n\n{section(times, copy, memory)}"
            measured[shape] = {"seconds": times, "copy_seconds": copy, "logits_tensors_of_memory": memory}
            goals += goals_of(shape, times, copy)
            del cases, source
    sections[f"Goals on {measured['gpu']}"] = report.goals_table(goals)
    report.write(arguments.output_dir, "gpu_loss", sections, measured)


if __name__ == "__main__":
    main()
