"""The benchmark of the paper's step beside a bare loop: that it runs, at a size that times nothing."""

import json
import subprocess
import sys
from pathlib import Path

from .launching import RECIPES, environment


def test_the_benchmark_of_the_step_runs(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.paper_step", "--pairs", "resnet20-resnet8", "--steps", "5"]
    words += ["--repeats", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(words, cwd=RECIPES.parent, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    times = json.loads((tmp_path / "paper_step.json").read_text())["resnet20-resnet8"]["seconds"]
    assert set(times) == {"bare loop", "DKDTrainer", "DKDTrainer, kd"}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in times.values())
    assert "step of DKD over that of KD" in (tmp_path / "paper_step.md").read_text()
