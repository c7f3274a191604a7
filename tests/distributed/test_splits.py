"""The gradient, the logs and the evaluation do not depend on how the examples are split. Stock Trainer's mostly do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .splits import NAMES, expected, step

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Results of two processes × 4 examples and of two processes × 2 × 2, from one launch."""
    output = tmp_path_factory.mktemp("splits")
    config = Path(__file__).with_name("two_processes.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "-m", "tests.distributed.splits", str(output)], cwd=ROOT, env=environment, check=True)
    results = torch.load(output / "results.pt", weights_only=True)
    assert all(result["world_size"] == 2 for result in results.values())
    return results


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The step on one process with all eight examples in one batch."""
    return step(name, 8, 1, str(tmp_path_factory.mktemp("whole")))


def assert_same_step(actual: dict[str, Any], whole: dict[str, Any]) -> None:
    assert_same_gradients(actual["gradients"], whole["gradients"])
    assert actual["logs"] == pytest.approx(whole["logs"], rel=1e-5)
    assert actual["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-5)


def assert_same_gradients(actual: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    difference = max((actual[key] - gradients[key]).abs().max() for key in gradients)
    assert largest > 1e-4
    assert difference <= 1e-5 * largest


def test_the_gradient_is_the_oracles(name: str, whole: dict[str, Any]) -> None:
    assert_same_gradients(whole["gradients"], expected(name))


def test_accumulation_gives_the_same_step(name: str, whole: dict[str, Any], tmp_path: Path) -> None:
    assert_same_step(step(name, 2, 4, str(tmp_path)), whole)


@pytest.mark.parametrize("split", [(4, 1), (2, 2)], ids=["2 × 4", "2 × 2 × 2"])
def test_two_processes_give_the_same_step(
    name: str, split: tuple[int, int], whole: dict[str, Any], two_processes: dict[Any, Any]
) -> None:
    assert_same_step(two_processes[name, split], whole)
