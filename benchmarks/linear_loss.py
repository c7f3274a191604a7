"""DKD of a language model's head, forward and backward, in float32: from hidden states and weights to their gradients.

    python -m benchmarks.linear_loss

- hf_dkd: `hf_dkd.losses.fused_linear_dkd_loss`
- hf_dkd, half ignored: the same with half the labels -100
- TRL: `ChunkedDivergenceFunction` of TRL 1.16, forward KL, as its `DistillationTrainer` calls it
- Liger: `LigerFusedLinearDistillationBase` of Liger-Kernel 0.8 with a DKD function, with its own chunks of 1024 rows
  (here one) and with chunks of 128; compiled, where torch.compile has a compiler
- materialised: both models' logits, `log_softmax` and KL with autograd
- materialised DKD: both models' logits, and the definition of DKD, `hf_dkd.dkd_loss`
- products: the four matrix products that none can do without, and nothing else

DKD in Liger's loss is written as lean as it goes: one KL, and terms of the target alone. The KLs have no target to
remove, and so less to do.

Before anything is timed, each DKD must agree with its definition, and TRL with the materialised KL.
"""

from collections.abc import Callable
from typing import Any

import torch
from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

import hf_dkd
from hf_dkd.losses import fused_linear_dkd_loss

from . import measure, report

ROWS, VOCABULARY, HIDDEN = 512, 65_536, 512
BYTES = ROWS * VOCABULARY * 4  # one logits tensor
OURS, HALF, TRL, MATERIALISED, PRODUCTS = "hf_dkd", "hf_dkd, half ignored", "TRL", "materialised", "products"
DEFINITION = "materialised DKD"
LIGERS = LIGER, LIGER_128, LIGER_COMPILED = "Liger", "Liger, chunks of 128", "Liger, compiled"


class LigerDKD(LigerFusedLinearDistillationBase):
    """TCKD + NCKD for Liger's base class, which asks for the sum over the rows of a chunk."""

    @staticmethod
    def distillation_loss_fn(
        student_logits: Tensor, teacher_logits: Tensor, target: Tensor, ignore_index: int = -100, **unused: Any
    ) -> Tensor:
        student, teacher = log_softmax(student_logits, dim=-1), log_softmax(teacher_logits, dim=-1)
        kl = kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        kept = target != ignore_index
        index = target.where(kept, 0).unsqueeze(-1)
        p, b = (log_probs.gather(-1, index).squeeze(-1) for log_probs in (student, teacher))
        rest_p, rest_b = (torch.log1p(-log_prob.exp()) for log_prob in (p, b))
        tckd = b.exp() * (b - p) + rest_b.exp() * (rest_b - rest_p)
        # KL = TCKD + (1 - b)·NCKD
        return (tckd + (kl - tckd) / rest_b.exp()).where(kept, 0.0).sum()

    @classmethod
    def forward(
        cls, ctx: Any, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
        labels: Tensor, chunk_size: int, compiled: bool,
    ) -> Any:  # fmt: skip
        return super().forward(
            cls, ctx, student_hidden, student_weight, teacher_hidden, teacher_weight, labels,
            chunk_size=chunk_size, compiled=compiled, weight_hard_loss=0.0, weight_soft_loss=1.0, compute_ce_loss=False,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return *LigerFusedLinearDistillationBase.backward(ctx, *grad_outputs)[:2], *(None,) * 5


def cases_at(rows: int, vocabulary: int, hidden: int) -> dict[str, measure.Case]:
    """The cases, each a function giving (loss, gradient of the hidden states, gradient of the weight)."""
    generator = torch.Generator().manual_seed(0)
    student_hidden, teacher_hidden = (torch.randn(rows, hidden, generator=generator) for _ in range(2))
    # Logits of a standard deviation of 2.
    student_weight, teacher_weight = (
        2 * hidden**-0.5 * torch.randn(vocabulary, hidden, generator=generator) for _ in range(2)
    )
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    half = labels.masked_fill(torch.randperm(rows, generator=generator) < rows // 2, -100)
    for leaf in (student_hidden, student_weight):
        leaf.requires_grad_()
    tensors = student_hidden, student_weight, teacher_hidden, teacher_weight

    def with_gradients(loss_of: Callable[[], Tensor]) -> measure.Case:
        def run() -> tuple[Tensor, ...]:
            loss = loss_of()
            return loss.detach(), *torch.autograd.grad(loss, [student_hidden, student_weight])

        return run

    def trl() -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, 0.0
        )
        return divergence.mean()

    def materialised(loss_of: Callable[[Tensor, Tensor], Tensor]) -> measure.Case:
        return with_gradients(lambda: loss_of(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T))

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = log_softmax(student, dim=-1), log_softmax(teacher, dim=-1)
        return kl_div(student, teacher, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def products() -> tuple[Tensor, ...]:
        student = student_hidden @ student_weight.T
        teacher = teacher_hidden @ teacher_weight.T
        return teacher, student @ student_weight, student.T @ student_hidden

    return {
        OURS: with_gradients(lambda: fused_linear_dkd_loss(*tensors, labels).loss),
        HALF: with_gradients(lambda: fused_linear_dkd_loss(*tensors, half).loss),
        TRL: with_gradients(trl),
        LIGER: with_gradients(lambda: LigerDKD.apply(*tensors, labels, 1024, False)),
        LIGER_128: with_gradients(lambda: LigerDKD.apply(*tensors, labels, 128, False)),
        LIGER_COMPILED: with_gradients(lambda: LigerDKD.apply(*tensors, labels, 1024, True)),
        MATERIALISED: materialised(kl),
        DEFINITION: materialised(lambda student, teacher: hf_dkd.dkd_loss(student, teacher, labels)),
        PRODUCTS: products,
    }


def check_agreement() -> None:
    """Raise an `AssertionError` unless each DKD gives the loss and gradients of the definition, and TRL those of KL."""
    cases = cases_at(256, 1_000, 32)
    for name, reference in {OURS: DEFINITION, TRL: MATERIALISED, LIGER: DEFINITION, LIGER_128: DEFINITION}.items():
        torch.testing.assert_close(cases[name](), cases[reference](), rtol=1e-4, atol=1e-7)


def compiles() -> bool:
    """Whether Liger's loss can be compiled here, which takes a C++ compiler and Python's headers."""
    try:
        cases_at(256, 1_000, 32)[LIGER_COMPILED]()
    except Exception as error:  # what torch.compile raises depends on what is missing
        print(f"{LIGER_COMPILED}: left out, {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


def main() -> None:
    arguments = report.options(__doc__, repeats=9).parse_args()
    if arguments.memory:
        print(measure.peak_extra_memory(cases_at(ROWS, VOCABULARY, HIDDEN)[arguments.memory]))
        return

    check_agreement()
    cases = cases_at(ROWS, VOCABULARY, HIDDEN)
    if not compiles():
        del cases[LIGER_COMPILED]
    ligers = [name for name in LIGERS if name in cases]
    memory = {name: measure.in_fresh_process(__spec__.name, "--memory", name) for name in cases}
    times = measure.interleaved(cases, repeats=arguments.repeats)

    def time(what: str, case: str, baseline: str, limit: float) -> report.Goal:
        return report.Goal(f"time, {what}", measure.ratios(times, case, baseline), limit)

    goals = [
        time("hf_dkd / TRL", OURS, TRL, 0.6),
        report.Goal("peak memory, hf_dkd / TRL", [memory[OURS] / memory[TRL]], 0.3),
        *(time(f"hf_dkd / {liger}", OURS, liger, 0.8) for liger in ligers),
        *(report.Goal(f"peak memory, hf_dkd / {liger}", [memory[OURS] / memory[liger]], 0.5) for liger in ligers),
        time("hf_dkd / materialised", OURS, MATERIALISED, 1.0),
        time("hf_dkd / products", OURS, PRODUCTS, 1.15),
        time("half ignored / all labels", HALF, OURS, 0.55),
    ]
    cells = {
        "peak memory, MB": [f"{memory[name] / 1e6:.0f}" for name in times],
        "logits tensors": [f"{memory[name] / BYTES:.2f}" for name in times],
    }
    sections = {
        f"{ROWS} rows, {VOCABULARY:,} classes, hidden size {HIDDEN}": report.times_table(times, [TRL, PRODUCTS], cells),
        "Goals": report.goals_table(goals),
    }
    report.write(arguments.output_dir, "linear_loss", sections, {"seconds": times, "bytes": memory})


if __name__ == "__main__":
    main()
