"""What a distillation leaves for people to read: the section of the model card, the curves, tables of several runs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .training_args import DKDArgumentsMixin

_TERMS = {
    "loss": "training loss",
    "ce": "CE, the hard-label loss",
    "tckd": "TCKD",
    "nckd": "NCKD",
    "top_k": "divergence among the top k",
    "dkd": "weighted distillation term",
    "teacher_agreement": "agreement with the teacher",
}


def add_to_model_card(
    output_dir: str | Path, teacher_name: str, settings: DKDArgumentsMixin, log_history: Sequence[Mapping[str, Any]]
) -> None:
    """Append to `output_dir/README.md` a section that names the teacher, the settings and the final terms."""
    with (Path(output_dir) / "README.md").open("a", encoding="utf-8") as card:
        card.write(distillation_section(teacher_name, settings, log_history))


def distillation_section(
    teacher_name: str, settings: DKDArgumentsMixin, log_history: Sequence[Mapping[str, Any]]
) -> str:
    """The Markdown section on a distillation, from the trainer's settings and its log history."""
    decoupled = settings.distillation == "dkd"
    method = (
        "decoupled knowledge distillation ([Zhao et al., CVPR 2022](https://arxiv.org/abs/2203.08679))"
        if decoupled
        else "classical knowledge distillation ([Hinton et al., 2015](https://arxiv.org/abs/1503.02531))"
    )
    rows = {
        "teacher": f"`{teacher_name}`",
        "α": f"{settings.dkd_alpha:g}",
        **({"β": f"{settings.dkd_beta:g}"} if decoupled else {}),
        "T": f"{settings.dkd_temperature:g}",
        **({"top k": f"{settings.dkd_top_k}, β {settings.dkd_top_k_beta:g} among them"} if settings.dkd_top_k else {}),
        **({"target without a label": "the teacher's class"} if settings.dkd_target == "teacher" else {}),
        **({"logits": "standardised"} if settings.dkd_standardize else {}),
        "CE weight": f"{settings.ce_weight:g}",
        "warm-up": _warmup(settings),
    }
    last: Mapping[str, Any] = next((entry for entry in reversed(log_history) if "dkd" in entry), {})
    rows |= {f"final {label}": f"{last[name]:.4g}" for name, label in _TERMS.items() if name in last}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"\n## Distillation\n\nThis model was trained by {method} with `hf_dkd`.\n\n"
        f"| setting | value |\n| --- | --- |\n{table}\n"
    )


def plot_curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: str | Path) -> None:
    """Save a figure of CE, TCKD and NCKD over the optimizer steps: for each method the mean of its runs, and each run.

    Args:
        histories: the `trainer.state.log_history` of every run, by method.
        path: where to write; the suffix tells the format. Needs matplotlib (`pip install "hf-dkd[plots]"`).
    """
    from matplotlib.figure import Figure

    panels = {"ce": "CE (hard labels)", "tckd": "TCKD (target against the rest)", "nckd": "NCKD (among the rest)"}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (term, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for index, (method, runs) in enumerate(histories.items()):
            curves = [curve for run in runs if (curve := [(e["step"], e[term]) for e in run if term in e])]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=f"C{index}", alpha=0.25, linewidth=1)
            if curves:
                means = [
                    (points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*curves, strict=False)
                ]
                axes.plot(*zip(*means, strict=True), color=f"C{index}", linewidth=2, label=method)
        axes.set(title=title, xlabel="optimizer step", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def compare_runs(runs: Mapping[str, Sequence[float]], seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Compare methods whose runs are paired: run number i of each has the same seed.

    Args:
        runs: by method, the metric of every run. A single run has neither spread nor differences.
        seconds: by method, how long every run took.

    Returns:
        By method `mean`, `spread` (standard deviation), `values`, `seconds` (mean), and `difference_to`: by rival the
        `mean` of the paired differences and `low` and `high`, their 95% t-interval. Needs scipy, which comes with
        `pip install "hf-dkd[metrics]"`.
    """
    from scipy.stats import ttest_rel

    table: dict[str, Any] = {}
    for method, values in runs.items():
        spread = statistics.stdev(values) if len(values) > 1 else None
        row: dict[str, Any] = {"mean": statistics.mean(values), "spread": spread, "values": values}
        row |= {"seconds": statistics.mean(seconds[method]), "difference_to": {}}
        for rival, others in runs.items():
            if rival != method and len(values) > 1:
                low, high = ttest_rel(values, others).confidence_interval(0.95)
                mean = statistics.mean(a - b for a, b in zip(values, others, strict=True))
                row["difference_to"][rival] = {"mean": mean, "low": float(low), "high": float(high)}
        table[method] = row
    return table


def comparison_table(
    table: Mapping[str, Any], metric: str, split: str, scale: float = 1.0, rivals: Sequence[str] | None = None
) -> str:
    """The Markdown table of what `compare_runs` returns: `metric` on `split`, times `scale` (100 is written as %).

    Differences are to `rivals`, by default to all methods.
    """
    rivals = list(table) if rivals is None else rivals

    def number(value: float | None) -> str:
        return "" if value is None else f"{scale * value:.2f}"

    head = [
        f"{split} {metric}" + (" %" if scale == 100 else ""),
        "spread",
        *(f"− {name}" for name in rivals),
        "seconds",
    ]
    lines = [f"| method | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
    for method, row in table.items():
        cells = [number(row["mean"]), number(row["spread"])]
        for rival in rivals:
            gap = row["difference_to"].get(rival)
            cells.append("" if gap is None else f"{number(gap['mean'])} [{number(gap['low'])}, {number(gap['high'])}]")
        lines.append(f"| {method} | {' | '.join(cells)} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def summarise_runs(runs: Sequence[Mapping[str, float]], metrics: Iterable[str]) -> dict[str, float]:
    """What runs come to that differ in their seed alone.

    Args:
        runs: of each its `parameters`, its `seconds`, and what `Trainer.evaluate` returned.
        metrics: shares in [0, 1], named without `eval_`. One that no run has is left out.

    Returns:
        Means by name, those of the metrics in per cent, and by `NAME_spread` the standard deviation of each metric that
        several runs have.

    Raises:
        ValueError: without runs.
    """
    if not runs:
        raise ValueError("no runs to summarise; give at least one.")
    row = {name: statistics.mean(run[name] for run in runs) for name in ("parameters", "seconds")}
    for name in metrics:
        values = [100 * run[f"eval_{name}"] for run in runs if f"eval_{name}" in run]
        if values:
            row[name] = statistics.mean(values)
        if len(values) > 1:
            row[f"{name}_spread"] = statistics.stdev(values)
    return row


def summary_table(rows: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """The plain-text table of what `summarise_runs` returns, by method: a column for each metric, with its title."""

    def percent(row: Mapping[str, float], name: str) -> str:
        spread = f" ± {row[f'{name}_spread']:.2f}" if f"{name}_spread" in row else ""
        return f"{row[name]:.2f}{spread}" if name in row else ""

    width = max([14, *map(len, rows)])
    widths = {name: max(14, len(title) + 1) for name, title in titles.items()}
    heads = [f"{title:>{widths[name]}}" for name, title in titles.items()]
    lines = [" ".join([f"{'':<{width}}", *heads, f"{'parameters':>11}", f"{'seconds':>8}"])]
    for method, row in rows.items():
        cells = [f"{percent(row, name):>{widths[name]}}" for name in titles]
        lines.append(" ".join([f"{method:<{width}}", *cells, f"{row['parameters']:>11,}", f"{row['seconds']:>8.1f}"]))
    return "\n".join(lines)


def plot_comparison(table: Mapping[str, Mapping[str, Any]], metric: str, path: str | Path) -> None:
    """Save a figure of several methods: left each run and the mean of each method, right paired differences.

    Args:
        table: for each method `values`, one for each seed, their `mean`, and `difference_to`, for each other method
            the paired difference as `mean`, `low` and `high` (its interval). The last method's differences are drawn.
        metric: what the values are.
        path: where to write; the suffix tells the format. Needs matplotlib (`pip install "hf-dkd[plots]"`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.4 * len(table) + 2.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for values in zip(*(row["values"] for row in table.values()), strict=True):
        left.plot(values, list(table), color="0.8", marker="o", linewidth=1)
    left.plot([row["mean"] for row in table.values()], list(table), "C1|", markersize=20, markeredgewidth=3)
    left.set(xlabel=metric, title="each seed (joined), and the mean")
    left.invert_yaxis()
    left.margins(y=0.1)
    left.grid(axis="x", alpha=0.3)
    last, gaps = list(table)[-1], list(table.values())[-1]["difference_to"]
    for place, gap in enumerate(gaps.values()):
        error = [[gap["mean"] - gap["low"]], [gap["high"] - gap["mean"]]]
        right.errorbar(gap["mean"], place, xerr=error, fmt="o", color="C0", capsize=6)
    right.axvline(0, color="0.5", linewidth=1)
    right.set_yticks(range(len(gaps)), [f"{last}\n− {rival}" for rival in gaps])
    right.set(title="paired difference, 95% t-interval", xlabel=metric, ylim=(-0.6, max(len(gaps), 1) - 0.4))
    right.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def _warmup(settings: DKDArgumentsMixin) -> str:
    if settings.dkd_warmup_epochs:
        held = ", held within an epoch" if settings.dkd_warmup_staircase else ""
        return f"{settings.dkd_warmup_epochs:g} epochs{held}"
    steps = settings.dkd_warmup_steps
    return f"{100 * steps:g}% of all steps" if 0 < steps < 1 else f"{steps:g} steps"
