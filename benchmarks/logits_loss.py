"""DKD on logits, forward and backward, in float32: the chunked loss beside what else computes a loss on logits.

    python -m benchmarks.logits_loss

- textbook: the formula with autograd, `benchmarks/textbook.py`
- decoupled: the definition with autograd, `hf_dkd.dkd_loss`
- chunked: the gradient derived by hand, `hf_dkd.losses.chunked_dkd_loss`
- chunked, in place: the same, where the gradient may take the memory of the student's logits
- cross_entropy: `torch.nn.functional.cross_entropy` on the student's logits, without any distillation

Before anything is timed, the first four must agree in loss and gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hf_dkd
from hf_dkd.losses import chunked_dkd_loss

from . import measure, report
from .textbook import textbook_dkd_loss

SETTINGS = {"alpha": 1.0, "beta": 2.0, "temperature": 2.0}
LARGE = 512, 151_936
LARGE_BYTES = LARGE[0] * LARGE[1] * 4
SMALL = (64, 100), (512, 1_000)
IN_PLACE = "chunked, in place"
BASELINES = ["textbook", "cross_entropy"]


def cases_at(rows: int, classes: int) -> tuple[dict[str, measure.Case], measure.Case]:
    """The cases at (N, C), functions that give (loss, gradient), and what restores the logits that one overwrites."""
    generator = torch.Generator().manual_seed(0)
    original, teacher = (2 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=generator)
    student = original.clone()

    def with_gradient(loss_of: Callable[[Tensor], Tensor]) -> measure.Case:
        def run() -> tuple[Tensor, Tensor]:
            logits = student.detach().requires_grad_()
            loss = loss_of(logits)
            return loss.detach(), torch.autograd.grad(loss, logits)[0]

        return run

    def chunked(logits: Tensor, overwrite: bool = False) -> Tensor:
        return chunked_dkd_loss(logits, teacher, labels, **SETTINGS, overwrite_student=overwrite).loss

    cases = {
        "textbook": with_gradient(lambda logits: textbook_dkd_loss(logits, teacher, labels, **SETTINGS)),
        "decoupled": with_gradient(lambda logits: hf_dkd.dkd_loss(logits, teacher, labels, **SETTINGS)),
        "chunked": with_gradient(chunked),
        IN_PLACE: with_gradient(lambda logits: chunked(logits, overwrite=True)),
        "cross_entropy": with_gradient(lambda logits: cross_entropy(logits, labels)),
    }
    return cases, lambda: student.copy_(original)


def check_agreement(rows: int, classes: int) -> None:
    """Raise an `AssertionError` unless all ways to compute DKD give the same loss and gradient."""
    cases, restore = cases_at(rows, classes)
    expected = cases["decoupled"]()
    for name in ("textbook", "chunked", IN_PLACE):
        restore()
        torch.testing.assert_close(cases[name](), expected, rtol=1e-4, atol=1e-7)


def main() -> None:
    arguments = report.options(__doc__, repeats=15).parse_args()
    if arguments.memory:
        cases, restore = cases_at(*LARGE)
        print(measure.peak_extra_memory(cases[arguments.memory], restore))
        return

    sections, measured, goals = {}, {}, []
    for rows, classes in SMALL:
        check_agreement(rows, classes)
        cases, _ = cases_at(rows, classes)
        # Logits as small as these stay in the cache, and so would the copy that restores them.
        del cases[IN_PLACE]
        times = measure.interleaved(cases, repeats=arguments.repeats)
        shape = f"{rows} × {classes:,}"
        sections[shape] = report.times_table(times, BASELINES)
        measured[shape] = {"seconds": times}
        faster = measure.ratios(times, "textbook", "chunked")
        goals.append(report.Goal(f"{shape}: time, textbook / chunked", faster, 1.5, at_least=True))

    cases, restore = cases_at(*LARGE)
    memory = {name: measure.in_fresh_process(__spec__.name, "--memory", name) / LARGE_BYTES for name in cases}
    times = measure.interleaved(cases, repeats=arguments.repeats, prepare=restore)
    shape = f"{LARGE[0]} × {LARGE[1]:,}"
    cells = [f"{memory[name]:.2f}" for name in times]
    sections[shape] = report.times_table(times, BASELINES, {"peak memory, logits tensors": cells})
    measured[shape] = {"seconds": times, "logits_tensors_of_memory": memory}
    faster, to_ce = measure.ratios(times, "textbook", "chunked"), measure.ratios(times, "chunked", "cross_entropy")
    goals += [
        report.Goal(f"{shape}: time, textbook / chunked", faster, 10, at_least=True),
        report.Goal(f"{shape}: time, chunked / cross_entropy", to_ce, 0.6),
        report.Goal(f"{shape}: peak memory of chunked, logits tensors", [memory["chunked"]], 1.1),
    ]
    sections["Goals"] = report.goals_table(goals)
    report.write(arguments.output_dir, "logits_loss", sections, measured)


if __name__ == "__main__":
    main()
