"""Figures of what classifiers make of the same examples, as in the paper: how a student differs from its teacher.

Each returns a matplotlib `Figure`, to show or to save: `reliability_diagram(logits, labels).savefig("picture.png")`.
They need `pip install "hf-dkd[metrics,plots]"` and are imported by nothing else in the package.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from .losses import decoupled_kl
from .metrics import reliability


def correlation_matrix(logits: np.ndarray) -> np.ndarray:
    """Correlations between the logits of two classes over the examples: (N, C) → (C, C).

    Each example's mean logit is taken off first: it moves all classes alike, and no softmax sees it.
    """
    return np.corrcoef((logits - logits.mean(1, keepdims=True)).T)


def class_correlations(students: Mapping[str, np.ndarray], teacher: np.ndarray) -> Figure:
    """How far each student's correlations between classes are from the teacher's (paper, Figure 3), a panel each.

    Args:
        students: logits (N, C) by name.
        teacher: its logits (N, C).

    Raises:
        ValueError: without students, or where shapes differ.
    """
    _check(students, teacher.shape)
    target = correlation_matrix(teacher)
    gaps = {name: np.abs(correlation_matrix(logits) - target) for name, logits in students.items()}
    figure, panels = _panels(gaps, width=4.5, margin=0.8, height=4.4)
    top = float(max(gap.max() for gap in gaps.values()))
    for axes, (name, gap) in zip(panels, gaps.items(), strict=True):
        image = axes.imshow(gap, vmin=0, vmax=top, cmap="magma")
        axes.set(title=f"{name}: mean {gap.mean():.3f}", xlabel="class", ylabel="class")
    figure.colorbar(image, ax=list(panels), label="|correlation of teacher − of student|")
    return figure


def tsne(features: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str], max_classes: int = 15) -> Figure:
    """t-SNE (van der Maaten and Hinton 2008) of the features below each model's head (paper, Figure 4), a panel each.

    Args:
        features: (N, D) by model, the teacher's among them; each may have its own D.
        labels: (N,) classes.
        names: of all classes, by number.
        max_classes: how many of the classes are shown: the first that occur.

    Raises:
        ValueError: without models, or where a model has another number of examples than there are labels.
    """
    _check(features, labels.shape)
    shown = np.unique(labels)[:max_classes]
    rows = np.isin(labels, shown)
    figure, panels = _panels(features, width=4.3, margin=2, height=4.4)
    for axes, (model, values) in zip(panels, features.items(), strict=True):
        places = TSNE(perplexity=min(30, (rows.sum() - 1) / 3), random_state=0).fit_transform(values[rows])
        for index, label in enumerate(shown):
            points = places[labels[rows] == label]
            axes.scatter(*points.T, s=8, color=colormaps["tab20"](index % 20), label=names[label])
        axes.set(title=model, xticks=[], yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7, markerscale=2)
    return figure


def terms_by_class(
    students: Mapping[str, np.ndarray], teacher: np.ndarray, labels: np.ndarray, temperature: float = 1.0
) -> Figure:
    """TCKD and NCKD, without T², as means over the examples of each class, from the first student's largest.

    Args:
        students: logits (N, C) by name.
        teacher: its logits (N, C).
        labels: (N,) classes.
        temperature: T.

    Raises:
        ValueError: without students, or where shapes differ.
    """
    _check(students, teacher.shape)
    _check({"teacher": teacher}, labels.shape)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    targets, classes = (torch.tensor(teacher, dtype=torch.float64), torch.tensor(labels))
    order: dict[int, np.ndarray] = {}
    for index, (name, logits) in enumerate(students.items()):
        terms = decoupled_kl(torch.tensor(logits).double(), targets, classes, temperature=temperature)
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


def reliability_diagram(logits: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """Accuracy against confidence of each model, a panel each, with its expected calibration error.

    Args:
        logits: (N, C) by model, the teacher's among them.
        labels: (N,) classes.

    Raises:
        ValueError: without models, or where a model has another number of examples than there are labels.
    """
    _check(logits, labels.shape)
    figure, panels = _panels(logits, width=3.4, height=3.6, sharey=True)
    for axes, (name, values) in zip(panels, logits.items(), strict=True):
        bins = reliability(values, labels)
        width = 1 / len(bins.examples)
        error = np.nansum(np.abs(bins.accuracy - bins.confidence) * bins.examples) / bins.examples.sum()
        axes.bar(np.arange(len(bins.examples)) * width, np.nan_to_num(bins.accuracy), width, align="edge", color="C0")
        axes.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1)
        axes.set(title=f"{name}: error {error:.3f}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return figure


def _check(models: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
    """Every model's array begins with `shape`: of the teacher's logits, or of the labels."""
    if not models:
        raise ValueError("no models to draw; give at least one, by name.")
    for name, values in models.items():
        if values.ndim != 2 or values.shape[: len(shape)] != shape:
            wanted = ", ".join(map(str, shape)) if len(shape) == 2 else f"{shape[0]}, …"
            raise ValueError(f"what {name!r} made of the examples is {values.shape}; expected ({wanted}).")


def _panels(models: Mapping[str, Any], *, width: float, height: float, margin: float = 0, **options: Any) -> Any:
    """A figure and its panels, one for each of the models side by side."""
    figure = Figure(figsize=(width * len(models) + margin, height), layout="constrained")
    return figure, figure.subplots(1, len(models), squeeze=False, **options)[0]
