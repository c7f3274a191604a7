"""Pictures of what students learned from their teacher, as in the paper: runs of a classification recipe side by side.

    python recipes/figures.py --runs outputs/compare/kd/seed-0 outputs/compare/dkd/seed-0 --output_dir outputs/figures

Reads each run's results.json, loads its data, student and teacher again, and writes

- curves.png: CE, TCKD and NCKD while training;
- correlation.png: how far the student's correlations between classes are from the teacher's (paper, Figure 3);
- tsne.png: t-SNE of the features below the head, of the teacher and of each student (paper, Figure 4);
- per_class.png: TCKD and NCKD of each class;
- reliability.png: accuracy against confidence, of the teacher and of each student.
"""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from options import fail, option, parse
from sklearn.manifold import TSNE
from torch import nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser

from hf_dkd import decoupled_kl
from hf_dkd.metrics import reliability
from hf_dkd.reporting import plot_curves

# The runs' own settings name where the student came from; here it comes from the run.
_OF_THE_START = ("student_layers", "student_config_overrides", "student_model_type", "resume_from_checkpoint")


@dataclass
class FigureArguments:
    runs: list[str] = field(default_factory=list, metadata={"help": "Output folders of a classification recipe."})
    output_dir: str = option("outputs/figures", "Where the pictures go.")
    max_samples: int = option(2000, "How many examples of the last split are looked at.")
    tsne_classes: int = option(15, "How many classes are in the t-SNE.")
    temperature: float = option(1.0, "Temperature of TCKD and NCKD by class.")
    config: str | None = option(None, "YAML or JSON file of these options; the command line wins over it.")


class Look(NamedTuple):
    """What one model makes of the examples: logits (N, C) and the features below its head (N, D)."""

    logits: np.ndarray
    features: np.ndarray


def head_of(model: nn.Module, classes: int) -> nn.Module:
    """The last linear layer, whose inputs are the features."""
    return [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == classes][-1]


def look(folder: Path, samples: int) -> tuple[Look, Look, np.ndarray, list[str]]:
    """Student and teacher of a run on its last split, the labels, and the names of the classes."""
    results = json.loads((folder / "results.json").read_text())
    recipe = importlib.import_module(Path(results["recipe"]).stem)
    if "teacher_model_name_or_path" not in results["settings"] or not hasattr(recipe, "ARGUMENTS"):
        fail(f"{folder} is no run of a classification recipe with a teacher: figures need both models.")
    settings = {name: value for name, value in results["settings"].items() if name not in _OF_THE_START}
    settings |= {"student_model_name_or_path": str(folder), "eval_with_teacher": True, "report_to": "none"}
    settings["include_for_metrics"] = ["teacher_logits"]
    trainer, splits = recipe.build(*HfArgumentParser(recipe.ARGUMENTS).parse_dict(settings))
    split = splits[list(results["metrics"])[-1]]

    kept: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    teacher_logits: list[np.ndarray] = []
    names = list(trainer.model.config.id2label.values())
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        head_of(model, len(names)).register_forward_pre_hook(
            lambda module, inputs, name=name: kept[name].append(inputs[0].detach().float().cpu())
        )

    def keep_teacher(prediction: EvalPrediction) -> dict[str, float]:
        teacher_logits.append(prediction.teacher_logits)  # type: ignore[attr-defined]
        return {}

    trainer.compute_metrics = keep_teacher
    output = trainer.predict(split.select(range(min(samples, len(split)))))
    features = {name: torch.cat(parts).flatten(1).numpy() for name, parts in kept.items()}
    student = Look(output.predictions, features["student"])
    return student, Look(teacher_logits[0], features["teacher"]), output.label_ids, names


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    tqdm.write(f"Wrote {path}")


def correlation_matrix(one: Look) -> np.ndarray:
    """Correlations between the logits of two classes over the examples, (C, C).

    Each example's mean logit is taken off first: it moves all classes alike, and no softmax sees it.
    """
    return np.corrcoef((one.logits - one.logits.mean(1, keepdims=True)).T)


def correlation(students: dict[str, Look], teacher: Look) -> Figure:
    gaps = {name: np.abs(correlation_matrix(one) - correlation_matrix(teacher)) for name, one in students.items()}
    figure = Figure(figsize=(4.5 * len(gaps) + 0.8, 4.4), layout="constrained")
    panels = figure.subplots(1, len(gaps), squeeze=False)[0]
    top = float(max(gap.max() for gap in gaps.values()))
    for axes, (name, gap) in zip(panels, gaps.items(), strict=True):
        image = axes.imshow(gap, vmin=0, vmax=top, cmap="magma")
        axes.set(title=f"{name}: mean {gap.mean():.3f}", xlabel="class", ylabel="class")
    figure.colorbar(image, ax=list(panels), label="|correlation of teacher − of student|")
    return figure


def tsne(students: dict[str, Look], teacher: Look, labels: np.ndarray, names: list[str], classes: int) -> Figure:
    shown = np.unique(labels)[:classes]
    rows = np.isin(labels, shown)
    looks = {"teacher": teacher, **students}
    figure = Figure(figsize=(4.3 * len(looks) + 2, 4.4), layout="constrained")
    for axes, (name, one) in zip(figure.subplots(1, len(looks)), looks.items(), strict=True):
        features = one.features[rows]
        places = TSNE(perplexity=min(30, (len(features) - 1) / 3), random_state=0).fit_transform(features)
        for index, label in enumerate(shown):
            points = places[labels[rows] == label]
            axes.scatter(*points.T, s=8, color=colormaps["tab20"](index % 20), label=names[label])
        axes.set(title=name, xticks=[], yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7, markerscale=2)
    return figure


def per_class(students: dict[str, Look], teacher: Look, labels: np.ndarray, temperature: float) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    logits = torch.tensor(teacher.logits, dtype=torch.float64)
    order: dict[int, np.ndarray] = {}
    for index, (name, one) in enumerate(students.items()):
        terms = decoupled_kl(torch.tensor(one.logits).double(), logits, torch.tensor(labels), temperature=temperature)
        for panel, (axes, term) in enumerate(zip(panels, terms, strict=True)):
            means = np.array([term.numpy()[labels == label].mean() for label in np.unique(labels)])
            ranks = order.setdefault(panel, np.argsort(-means))
            axes.plot(means[ranks], color=f"C{index}", label=f"{name}: mean {term.mean():.3f}")
    for axes, title in zip(panels, ("TCKD", "NCKD"), strict=True):
        axes.set(title=f"{title} of each class, T = {temperature:g}", xlabel="class, from the first run's largest")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def reliability_diagram(students: dict[str, Look], teacher: Look, labels: np.ndarray) -> Figure:
    looks = {"teacher": teacher, **students}
    figure = Figure(figsize=(3.4 * len(looks), 3.6), layout="constrained")
    for axes, (name, one) in zip(figure.subplots(1, len(looks), sharey=True), looks.items(), strict=True):
        bins = reliability(one.logits, labels)
        width = 1 / len(bins.examples)
        error = np.nansum(np.abs(bins.accuracy - bins.confidence) * bins.examples) / bins.examples.sum()
        axes.bar(np.arange(len(bins.examples)) * width, np.nan_to_num(bins.accuracy), width, align="edge", color="C0")
        axes.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1)
        axes.set(title=f"{name}: error {error:.3f}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return figure


def main() -> None:
    args, _ = parse(FigureArguments)
    if not args.runs:
        fail("no runs: give --runs DIR [DIR …], output folders of a classification recipe.")
    folders = [Path(run) for run in args.runs]
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    students, histories = {}, {}
    for folder in tqdm(folders, unit="run"):
        if not (folder / "results.json").exists():
            fail(f"{folder} has no results.json: give the --output_dir of a finished run.")
        name = folder.parent.name if folder.name.startswith("seed-") else folder.name
        students[name], teacher, labels, names = look(folder, args.max_samples)
        histories[name] = [json.loads((folder / "trainer_state.json").read_text())["log_history"]]
    plot_curves(histories, output / "curves.png")
    save(correlation(students, teacher), output / "correlation.png")
    save(tsne(students, teacher, labels, names, args.tsne_classes), output / "tsne.png")
    save(per_class(students, teacher, labels, args.temperature), output / "per_class.png")
    save(reliability_diagram(students, teacher, labels), output / "reliability.png")


if __name__ == "__main__":
    main()
