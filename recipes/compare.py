"""Compare cross-entropy, classical KD and DKD with any recipe: the same student, initial weights and batches per seed.

    python recipes/compare.py --recipe bert_classification.py --seeds 5 --output_dir outputs/compare -- \
        --dataset_name FOLDER --teacher_model_name_or_path teacher --student_layers 0,5

What stands after -- goes to the recipe. A method is a name with settings of its own: --methods cross-entropy kd dkd
dkd:dkd_beta=4,dkd_temperature=2. An interrupted comparison goes on where it stopped. --trials 8 first tries eight
settings per method on the validation split, without the test split, and takes the best to the seeds.
"""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from common import fail, option, parse
from datasets import load_dataset
from tqdm.auto import tqdm

from hf_dkd.metrics import metric_of_predictions
from hf_dkd.reporting import compare_runs, comparison_table, plot_comparison
from hf_dkd.tuning import draw_settings

METHODS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"dkd_alpha": 0.0, "dkd_beta": 0.0},
    "kd": {"distillation": "kd"},
    "dkd": {},
}
# What trials draw from: one of a list, or log-uniformly between low and high. --tuning FILE brings others.
TUNING: dict[str, dict[str, Any]] = {
    "all": {"learning_rate": {"low": 3e-5, "high": 1e-3}},
    "kd": {"dkd_alpha": [0.5, 1.0, 2.0, 4.0], "dkd_temperature": [1.0, 2.0, 4.0]},
    "dkd": {"dkd_alpha": [0.5, 1.0, 2.0], "dkd_beta": [0.5, 1.0, 2.0, 4.0], "dkd_temperature": [1.0, 2.0, 4.0]},
}
TRIAL_SEED = 1000


@dataclass
class CompareArguments:
    recipe: str = option("bert_classification.py", "File name of the recipe, beside this one, or a path.")
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "NAME or NAME:option=value,…"})
    seeds: int = option(5, "Runs per method, with seeds 0, 1, …")
    rivals: list[str] | None = field(default=None, metadata={"help": "Differences to these only, in the table."})
    trials: int = option(0, "Settings tried per method before; 0 takes the recipe's and the method's as they are.")
    tuning: str | None = option(None, "YAML file of what trials draw from: {all: {option: [values]}, dkd: {…}, …}.")
    launch: str = option("--num_processes 1", "Options of accelerate launch, such as --config_file FILE.")
    output_dir: str = option("outputs/compare", "Where runs, table and figure go.")
    config: str | None = option(None, "YAML or JSON file of these options; the command line wins over it.")


def settings_of(method: str) -> dict[str, Any]:
    name, _, own = method.partition(":")
    if name not in METHODS:
        fail(f"--methods {method}: expected {', '.join(METHODS)}, with settings as in dkd:dkd_beta=4,ce_weight=0.5.")
    pairs = (pair.partition("=") for pair in own.split(",") if pair)
    return METHODS[name] | {option: yaml.safe_load(value) for option, _, value in pairs}


def run_once(args: CompareArguments, passed: list[str], folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results of one run of the recipe, which is started, resumed, or found done in `folder`."""
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    wanted, done = [*passed, *words], folder / "results.json"
    folder.mkdir(parents=True, exist_ok=True)
    command_file = folder / "command.json"
    if command_file.exists() and json.loads(command_file.read_text()) != wanted:
        fail(f"{folder} holds a run with other options: choose another --output_dir, or remove it.")
    command_file.write_text(json.dumps(wanted))
    if not done.exists():
        recipe = Path(args.recipe) if Path(args.recipe).exists() else Path(__file__).with_name(args.recipe)
        launch = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(args.launch), str(recipe)]
        resume = ["--output_dir", str(folder), "--resume_from_checkpoint", "last"]
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run([*launch, *wanted, *resume], stdout=log, stderr=log, check=False).returncode
        if code != 0 or not done.exists():
            lines = [line.strip() for line in (folder / "log.txt").read_text().splitlines() if "rror" in line and code]
            cause = next((line for line in reversed(lines) if "CalledProcessError" not in line), "no results")
            fail(f"the run in {folder} failed ({cause}); see its log.txt. Start again to go on from there.")
    return json.loads(done.read_text())


def score(results: dict[str, Any], folder: Path, split: str) -> float:
    """The primary metric on `split`. The predictions, which are those of the last split, must tell the same."""
    metric = results["primary_metric"]
    value = float(results["metrics"][split][metric])
    if split == list(results["metrics"])[-1]:
        rows = load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
        told = metric_of_predictions(metric, rows)
        if not math.isclose(told, value, rel_tol=1e-6, abs_tol=1e-9):
            fail(f"{folder}: results.json says {metric} {value}, its predictions {told}: the files do not match.")
    return value


def tune(args: CompareArguments, passed: list[str], method: str, bar: Any) -> dict[str, Any]:
    """The best of `trials` settings on the validation split. Methods get equally many, alike in what they share."""
    spaces = yaml.safe_load(Path(args.tuning).read_text()) if args.tuning else TUNING
    space = spaces.get("all", {}) | spaces.get(method.partition(":")[0], {})
    scores: list[tuple[float, dict[str, Any]]] = []
    for number in range(args.trials):
        bar.set_description(f"{method}, trial {number}")
        try:
            settings = draw_settings(space, TRIAL_SEED + number) | settings_of(method)
        except ValueError as error:
            fail(f"--tuning {args.tuning}: {error}")
        folder = Path(args.output_dir) / method.replace("/", "_") / f"trial-{number}"
        results = run_once(args, passed, folder, settings | {"seed": TRIAL_SEED, "evaluate_on_test": False})
        sign = 1 if results["higher_is_better"] else -1
        scores.append((sign * score(results, folder, "validation"), settings))
        bar.update()
    return max(scores, key=lambda pair: pair[0])[1]


def main() -> None:
    words = sys.argv[1:]
    own, passed = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    sys.argv[1:] = own
    args, _ = parse(CompareArguments)
    output = Path(args.output_dir)
    bar = tqdm(total=len(args.methods) * (args.seeds + args.trials), unit="run")
    chosen = {m: tune(args, passed, m, bar) if args.trials else settings_of(m) for m in args.methods}
    runs: dict[str, list[float]] = {method: [] for method in args.methods}
    seconds: dict[str, list[float]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):
        for method, settings in chosen.items():
            bar.set_description(f"{method}, seed {seed}")
            folder = output / method.replace("/", "_") / f"seed-{seed}"
            results = run_once(args, passed, folder, settings | {"seed": seed})
            split = list(results["metrics"])[-1]
            runs[method].append(score(results, folder, split))
            seconds[method].append(results["training_seconds"])
            bar.update()
    bar.close()

    table, metric = compare_runs(runs, seconds), results["primary_metric"]
    scale = 100.0 if all(0 <= value <= 1 for values in runs.values() for value in values) else 1.0
    text = comparison_table(table, metric, split, scale, args.rivals)
    (output / "compare.md").write_text(text + "\n")
    facts = {"settings": chosen, "trials": args.trials, "table": table}
    (output / "compare.json").write_text(json.dumps(facts, indent=2))
    plot_comparison(table, metric, output / "compare.png")
    print(f"\n{text}\n\n{args.seeds} seeds. Wrote compare.md, compare.json and compare.png to {output}.")


if __name__ == "__main__":
    main()
