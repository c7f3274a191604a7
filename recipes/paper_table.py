"""What runs of `paper_cifar100.py` reached, beside what the paper and others report.

    python recipes/paper_table.py --runs outputs/compare --output_dir outputs/paper_table

Looks for runs in the folders and below them. Runs in seed-0, seed-1, … of one folder, as those of `compare.py` are,
make one line: the mean over seeds and its 95 % t-interval, of the last epoch and of the best one. The paper's figures
for DKD are of the best epoch on the test set, those for other methods of the last one.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import fail, option, parse
from paper_cifar100 import accuracies
from paper_options import is_harmless
from paper_presets import DEFAULT_PAIR, PAIRS, published
from scipy.stats import ttest_1samp

# What the paper's figures do not depend on. Whether the data is CIFAR-100 is for the reader to know.
_FREE = {
    "pair", "seed", "distillation", "num_train_epochs", "teacher_model_name_or_path", "teacher_epochs", "dataset_name",
    "dataset_config_name", "train_file", "test_file", "image_column_name", "label_column_name", "bf16", "fp16", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "teacher_compile", "use_cpu", "full_determinism",
    "ddp_backend", "ddp_timeout",
}  # fmt: skip
# With one of these the teacher has another accuracy too.
_OTHER_TEACHER = (
    "image_size", "max_train_samples", "max_eval_samples", "validation_share", "label_noise", "auto_augment",
    "other_teacher",
)  # fmt: skip


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
    seconds: float | None
    method: str | None


def method_of(settings: dict[str, Any]) -> str | None:
    """The method of the paper's table that a run repeats; None for one that is not there."""
    pair, distillation = settings.get("pair", DEFAULT_PAIR), settings.get("distillation", "dkd")
    own = published(pair, distillation, settings.get("num_train_epochs", PAIRS[pair].schedule.epochs))
    changed = {
        name
        for name, value in settings.items()
        if name not in _FREE and not is_harmless(name) and value != own.get(name)
    }
    if settings.get("dkd_alpha") == settings.get("dkd_beta") == 0:
        return None if changed - {"dkd_alpha", "dkd_beta"} else "cross-entropy"
    return None if changed else distillation


def read(folder: Path, method: str | None, seconds: float | None = None) -> Run:
    """The run whose state is in a folder; `seconds` is how long it trained, where that is known."""
    state = json.loads((folder / "trainer_state.json").read_text())
    last, best, _ = accuracies(state["log_history"])
    return Run(100 * last, 100 * best, state["epoch"], seconds, method)


def was_evaluated(folder: Path) -> bool:
    """Whether a teacher's folder tells accuracies, as those of `paper_cifar100.py` do."""
    state = folder / "trainer_state.json"
    return state.exists() and any("eval_accuracy" in entry for entry in json.loads(state.read_text())["log_history"])


def find(folders: list[str]) -> dict[tuple[str, str, str], list[Run]]:
    """Runs in the folders and below, by pair, name and the folder that seeds share, and the teachers that they had."""
    found: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    teachers: dict[Path, tuple[str, str | None]] = {}
    for file in sorted({path.resolve() for folder in folders for path in Path(folder).rglob("results.json")}):
        results = json.loads(file.read_text())
        if results["recipe"] != "paper_cifar100.py":
            continue
        settings, folder = results["settings"], file.parent
        pair = settings.get("pair", DEFAULT_PAIR)
        group = folder.parent if folder.name.startswith("seed-") else folder
        seconds = None if results["resumed_from"] else results["training_seconds"]  # those of the last slice
        found[pair, group.name, str(group)].append(read(folder, method_of(settings), seconds))
        changed = any(name in settings for name in _OTHER_TEACHER)
        if "teacher_model_name_or_path" in settings:
            teachers[Path(settings["teacher_model_name_or_path"]).resolve()] = pair, None if changed else "teacher"
    for folder, (pair, method) in teachers.items():
        if was_evaluated(folder):
            found[pair, f"teacher {folder.name}", str(folder)].append(read(folder, method))
    return found


def interval(values: list[float]) -> dict[str, float]:
    """The mean and, of several values, the ends of its 95 % t-interval."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean}
    if min(values) == max(values):  # their spread is 0, of which SciPy warns
        return {"mean": mean, "low": mean, "high": mean}
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
    for (name, method, _), runs in sorted(found.items()):
        pair, kind = PAIRS[name], runs[0].method
        last, best = interval([run.last for run in runs]), interval([run.best for run in runs])
        paper, reruns = pair.accuracy.get(kind or ""), pair.reruns if kind == "dkd" else ""
        timed = [run.seconds for run in runs if run.seconds is not None]
        seconds = round(sum(timed) / len(timed)) if timed else None
        table.append({"pair": name, "method": method, "epochs": runs[0].epochs, "runs": len(runs), "paper": paper})
        table[-1] |= {"last_epoch": last, "best_epoch": best, "reruns": reruns, "seconds": seconds}
        cells = [name, method, f"{runs[0].epochs:g}", len(runs), shown(last), shown(best), paper or "", reruns]
        lines.append(f"| {' | '.join(map(str, cells))} | {seconds or ''} |")
    text, output = "\n".join(lines), Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    (output / "table.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
    print(f"{text}\n\nWrote table.md and table.json to {output}.")


if __name__ == "__main__":
    main()
