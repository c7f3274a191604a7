"""Comparing methods with a recipe: the table against the predictions, equal conditions, going on, and tuning."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from scipy import stats

from .launching import RECIPES, environment, recipe

METHODS = ("cross-entropy", "dkd:dkd_beta=2")


def compare(text_data: dict[str, Any], teacher: Path, output: Path, *options: Any, **recipe_options: Any) -> Any:
    """Run the comparison to its end."""
    own = ["--seeds", 2, "--output_dir", output, "--launch", "--num_processes 1 --cpu --quiet", *options]
    given = text_data | {"teacher_model_name_or_path": teacher, "student_layers": "0,3", "max_steps": 6}
    given |= {"eval_strategy": "no", "logging_steps": 1, "use_cpu": True} | recipe_options
    passed = [word for name, value in given.items() for word in (f"--{name}", value)]
    command = [sys.executable, RECIPES / "compare.py", *own, "--", *passed]
    return subprocess.run(
        [str(word) for word in command], env=environment(), capture_output=True, text=True, check=False
    )


def accuracy(folder: Path) -> float:
    rows = load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
    return sum(row["label"] == row["prediction"] for row in rows) / len(rows)


def test_the_table_is_what_the_predictions_say(text_data: dict[str, Any], text_teacher: Path, tmp_path: Path) -> None:
    done = compare(text_data, text_teacher, tmp_path, "--methods", *METHODS)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((tmp_path / "compare.json").read_text())["table"]
    assert list(table) == list(METHODS)
    values = {name: [accuracy(tmp_path / name / f"seed-{seed}") for seed in range(2)] for name in METHODS}
    for name, rival in (METHODS, METHODS[::-1]):
        a, b = values[name], values[rival]
        gaps = [x - y for x, y in zip(a, b, strict=True)]
        half = stats.t.ppf(0.975, 1) * abs(gaps[0] - gaps[1]) / 2
        row, gap = table[name], table[name]["difference_to"][rival]
        assert row["values"] == a
        assert row["mean"] == pytest.approx(sum(a) / 2)
        assert row["spread"] == pytest.approx(abs(a[0] - a[1]) / 2**0.5)
        assert (gap["mean"], gap["low"]) == (pytest.approx(sum(gaps) / 2), pytest.approx(sum(gaps) / 2 - half))
        assert f"| {name} | {100 * row['mean']:.2f} | {100 * row['spread']:.2f} |" in done.stdout
    assert (tmp_path / "compare.md").read_text().strip() in done.stdout
    assert (tmp_path / "compare.png").stat().st_size > 10_000

    # Equal conditions: the first step sees the same examples through the same weights, whatever the method.
    for seed in range(2):
        histories = [json.loads((tmp_path / n / f"seed-{seed}/trainer_state.json").read_text()) for n in METHODS]
        assert len({history["log_history"][0]["ce"] for history in histories}) == 1

    # Once more: what is done stays, what is not is run, and other options are refused.
    lost, kept = (tmp_path / METHODS[1] / f"seed-{seed}/results.json" for seed in range(2))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    again = compare(text_data, text_teacher, tmp_path, "--methods", *METHODS)
    assert again.returncode == 0, again.stderr[-3000:]
    assert lost.exists()
    assert kept.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "compare.json").read_text())["table"][METHODS[1]]["values"] == values[METHODS[1]]
    other = compare(text_data, text_teacher, tmp_path, "--methods", *METHODS, max_steps=7)
    assert "holds a run with other options" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_tuning_gives_every_method_as_many_trials_and_leaves_the_test_split(
    text_data: dict[str, Any], text_teacher: Path, tmp_path: Path
) -> None:
    tuning = tmp_path / "tuning.yaml"
    tuning.write_text("all: {learning_rate: {low: 1e-4, high: 1e-2}}\ndkd: {dkd_beta: [1.0, 2.0, 4.0]}")
    options = ("--trials", 2, "--seeds", 1, "--tuning", tuning, "--methods", "cross-entropy", "dkd")
    done = compare(text_data, text_teacher, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = json.loads((tmp_path / "out/compare.json").read_text())["settings"]
    rates = {}
    for name in ("cross-entropy", "dkd"):
        trials = [
            json.loads(path.read_text()) for path in sorted((tmp_path / "out" / name).glob("trial-*/results.json"))
        ]
        assert len(trials) == 2
        assert all(list(trial["metrics"]) == ["validation"] for trial in trials)
        rates[name] = [trial["settings"]["learning_rate"] for trial in trials]
        best = max(trials, key=lambda trial: trial["metrics"]["validation"]["accuracy"])
        assert chosen[name]["learning_rate"] == best["settings"]["learning_rate"]
        final = json.loads((tmp_path / "out" / name / "seed-0/results.json").read_text())
        assert final["settings"]["learning_rate"] == best["settings"]["learning_rate"]
        assert "test" in final["metrics"]
    assert rates["cross-entropy"] == rates["dkd"]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates["dkd"])


def test_an_unknown_method_or_tuning_gets_one_line(text_data: dict[str, Any], tmp_path: Path) -> None:
    tuning = tmp_path / "tuning.yaml"
    tuning.write_text("dkd: {dkd_beta: 2.0}")
    for options, message in (
        (("--methods", "dkt"), "--methods dkt: expected cross-entropy, kd, dkd"),
        (("--methods", "dkd", "--trials", 1, "--tuning", tuning), f"--tuning {tuning}: dkd_beta draws from 2.0"),
    ):
        done = compare(text_data, tmp_path, tmp_path, *options)
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_score_is_checked_against_the_predictions(tmp_path: Path) -> None:
    Dataset.from_dict({"label": [0, 1, 2, 1], "prediction": [0, 1, 1, 1]}).to_parquet(tmp_path / "predictions.parquet")
    results = {"primary_metric": "accuracy", "metrics": {"validation": {"accuracy": 0.0}, "test": {"accuracy": 0.75}}}
    score = recipe("compare").score
    assert score(results, tmp_path, "test") == 0.75
    assert score(results, tmp_path, "validation") == 0.0
    results["metrics"]["test"]["accuracy"] += 1e-3
    with pytest.raises(SystemExit, match="the files do not match"):
        score(results, tmp_path, "test")
