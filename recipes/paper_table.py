"""What runs of `paper_cifar100.py` reached, beside what the paper and others report.

    python recipes/paper_table.py --runs outputs/compare --output_dir outputs/paper_table

Looks for runs in the folders and below them. Runs whose folders are called seed-0, seed-1, … in one folder, as those of
`compare.py` are, make one line: the mean over seeds and its 95 % t-interval, of the last epoch and of the best one. The
paper's figures for DKD are of the best epoch on the test set, those for other methods of the last one.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import fail, option, parse
from paper_cifar100 import accuracies
from paper_presets import PAIRS
from scipy.stats import ttest_1samp

# With one of these a run has no counterpart in the paper's main tables.
_OTHER_DATA = ("image_size", "max_train_samples", "validation_share", "label_noise", "auto_augment")
_OTHERWISE = (*_OTHER_DATA, "learning_rate", "ce_weight", "dkd_alpha", "dkd_beta", "dkd_temperature")


@dataclass
class TableArguments:
    runs: list[str] = field(default_factory=list, metadata={"help": "Folders of runs, or folders of such."})
    output_dir: str = option("outputs/paper_table", "Where table.md and table.json go.")
    config: str | None = option(None, "YAML or JSON file of these options; the command line wins over it.")


class Run(NamedTuple):
    """Accuracies of a run in per cent, its epochs and seconds, and the method of the paper's table, if it is one."""

    last: float
    best: float
    epochs: float
    seconds: float
    method: str | None


def method_of(settings: dict[str, Any]) -> str | None:
    """The method of the paper's table that a run repeats; None for one that is not there."""
    changed = {name for name in _OTHERWISE if name in settings}
    if float(settings.get("dkd_alpha", 1)) == float(settings.get("dkd_beta", 1)) == 0:
        return None if changed - {"dkd_alpha", "dkd_beta"} else "cross-entropy"
    return None if changed else str(settings.get("distillation", "dkd"))


def read(folder: Path, method: str | None, seconds: float = 0.0) -> Run:
    state = json.loads((folder / "trainer_state.json").read_text())
    last, best, _ = accuracies(state["log_history"])
    return Run(100 * last, 100 * best, state["epoch"], seconds, method)


def find(folders: list[str]) -> dict[tuple[str, str], list[Run]]:
    """Runs by pair and method, the teachers too."""
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    teachers: dict[Path, tuple[str, str | None]] = {}
    for file in sorted(path for folder in folders for path in Path(folder).rglob("results.json")):
        results = json.loads(file.read_text())
        if results["recipe"] != "paper_cifar100.py":
            continue
        settings, folder = results["settings"], file.parent
        pair = settings.get("pair", "resnet32x4-resnet8x4")
        name = folder.parent.name if folder.name.startswith("seed-") else folder.name
        found[pair, name].append(read(folder, method_of(settings), results["training_seconds"]))
        changed = any(name in settings for name in _OTHER_DATA)
        teachers[Path(settings["teacher_model_name_or_path"])] = pair, None if changed else "teacher"
    for folder, (pair, method) in teachers.items():
        if (folder / "trainer_state.json").exists():
            found[pair, f"teacher {folder.name}"].append(read(folder, method))
    return found


def interval(values: list[float]) -> dict[str, float]:
    """The mean and, of several values, the ends of its 95 % t-interval."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean}
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return {"mean": mean, "low": float(low), "high": float(high)}


def shown(of: dict[str, float]) -> str:
    return f"{of['mean']:.2f}" + (f" [{of['low']:.2f}, {of['high']:.2f}]" if "low" in of else "")


def main() -> None:
    args, _ = parse(TableArguments)
    found = find(args.runs)
    if not found:
        fail(
            f"no runs of paper_cifar100.py in {args.runs}: give --runs DIR [DIR …], output folders of it or compare.py."
        )
    lines = ["| pair | method | epochs | runs | last epoch % | best epoch % | paper % | reruns % | seconds |"]
    lines.append("| --- |" + " --- |" * 8)
    table = []
    for (name, method), runs in sorted(found.items()):
        pair, kind = PAIRS[name], runs[0].method
        last, best = interval([run.last for run in runs]), interval([run.best for run in runs])
        paper, reruns = pair.accuracy.get(kind or ""), pair.reruns if kind == "dkd" else ""
        seconds = sum(run.seconds for run in runs) / len(runs)
        table.append({"pair": name, "method": method, "epochs": runs[0].epochs, "runs": len(runs), "paper": paper})
        table[-1] |= {"last_epoch": last, "best_epoch": best, "reruns": reruns, "seconds": seconds}
        cells = [name, method, f"{runs[0].epochs:g}", len(runs), shown(last), shown(best), paper or "", reruns]
        lines.append(f"| {' | '.join(map(str, cells))} | {seconds:.0f} |")
    text, output = "\n".join(lines), Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    (output / "table.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
    print(f"{text}\n\nWrote table.md and table.json to {output}.")


if __name__ == "__main__":
    main()
