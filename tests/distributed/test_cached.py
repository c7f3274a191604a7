"""Two processes write one cache, and train on it as one process with the live teacher does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from tests.cache_helpers import rows_of, teacher_of

from .cached import SETTINGS, train, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any]]:
    output = tmp_path_factory.mktemp("cached")
    config = Path(__file__).with_name("two_processes.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "-m", "tests.distributed.cached", str(output)], cwd=ROOT, env=environment, check=True)
    results = torch.load(output / "results.pt", weights_only=True)
    assert all(result["world_size"] == 2 for result in results.values())
    return output, results


@pytest.mark.parametrize("case", SETTINGS)
def test_two_processes_write_the_rows_of_one(case: str, two_processes: tuple[Path, Any], tmp_path: Path) -> None:
    ours = write(case.split()[0], tmp_path, **SETTINGS[case])
    theirs = load_from_disk(two_processes[0] / case)
    assert len(list((two_processes[0] / case).glob("*.arrow"))) == 4
    assert len(theirs) == 16
    assert theirs["input_ids"] == ours["input_ids"]
    assert theirs["labels"] == ours["labels"]
    for column in theirs.column_names:
        if column.startswith("teacher_"):
            for one, other in zip(theirs[column], ours[column], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("how", ["", "again", "stream"])
@pytest.mark.parametrize("case", SETTINGS)
def test_two_processes_train_on_it_as_one_with_the_live_teacher(
    case: str, how: str, two_processes: tuple[Path, Any], tmp_path: Path
) -> None:
    name = case.split()[0]
    data = rows_of(name, seeds=2)
    rows: Any = data.to_iterable_dataset() if how == "stream" else data
    one = train(name, rows, tmp_path, teacher_of(name), batch_size=8)
    two = two_processes[1][(case, how) if how else case]
    assert (two["weights"] - one["weights"]).abs().max() <= 1e-6
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert bool(one["metrics"]) is (how != "stream")
