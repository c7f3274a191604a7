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
from common import fail, option, parse
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser

from hf_dkd.figures import class_correlations, reliability_diagram, terms_by_class, tsne
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
    logits = {name: one.logits for name, one in students.items()}
    features = {name: one.features for name, one in {"teacher": teacher, **students}.items()}
    save(class_correlations(logits, teacher.logits), output / "correlation.png")
    save(tsne(features, labels, names, args.tsne_classes), output / "tsne.png")
    save(terms_by_class(logits, teacher.logits, labels, args.temperature), output / "per_class.png")
    save(reliability_diagram({"teacher": teacher.logits, **logits}, labels), output / "reliability.png")


if __name__ == "__main__":
    main()
