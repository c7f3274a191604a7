"""The gradient, the logs and the evaluation do not depend on how the examples are split. Stock Trainer's mostly do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .splits import (
    NAMES,
    NAMES_OF_SEVERAL_STEPS,
    NAMES_WITH_OPTIONS,
    OPTIONS,
    PROBLEMS,
    expected,
    generation,
    several_steps,
    step,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The results of two processes, from one launch: `splits.main`."""
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


def test_language_models_take_the_fused_loss(name: str, whole: dict[str, Any]) -> None:
    assert whole["fused"] == (name in ("bert_mlm", "llama", "gpt2", "t5"))


def assert_same_step(actual: dict[str, Any], whole: dict[str, Any]) -> None:
    assert_same_gradients(actual["gradients"], whole["gradients"])
    assert actual["fused"] == whole["fused"]
    (logs,), (expected_logs,) = actual["logs"], whole["logs"]
    assert logs == pytest.approx(expected_logs, rel=1e-5)
    terms = ("loss", "tckd", "nckd", "teacher_agreement", "teacher_accuracy")
    assert {f"eval_{count}_{term}" for count in (5, 6, 7) for term in terms} <= whole["evaluation"].keys()
    assert actual["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-5, nan_ok=True)


def assert_same_gradients(actual: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
    """Every parameter's to 1e-5; 1e-7 of the whole is rounding, where a parameter's gradient cancels to nothing."""
    assert actual.keys() == gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert whole > 1e-4
    for name, gradient in gradients.items():
        error = (actual[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7 * whole, f"{name}: {error:.2e} of {gradient.norm():.2e}"


def test_the_gradient_is_the_oracles(name: str, whole: dict[str, Any]) -> None:
    assert_same_gradients(whole["gradients"], expected(name))


def test_accumulation_gives_the_same_step(name: str, whole: dict[str, Any], tmp_path: Path) -> None:
    assert_same_step(step(name, 2, 4, str(tmp_path)), whole)


@pytest.mark.parametrize("split", [(4, 1), (2, 2)], ids=["2 × 4", "2 × 2 × 2"])
def test_two_processes_give_the_same_step(
    name: str, split: tuple[int, int], whole: dict[str, Any], two_processes: dict[Any, Any]
) -> None:
    assert_same_step(two_processes["step", name, *split], whole)


@pytest.mark.parametrize("split", [(4, 1), (2, 2)], ids=["2 × 4", "2 × 2 × 2"])
def test_two_processes_without_a_teacher_give_the_gradient_of_all_labels(
    name: str, split: tuple[int, int], two_processes: dict[Any, Any]
) -> None:
    assert_same_gradients(two_processes["without teacher", name, *split]["gradients"], expected(name, distils=False))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES_WITH_OPTIONS)
def test_two_processes_give_the_same_step_with_each_option(
    name: str, option: str, two_processes: dict[Any, Any], tmp_path: Path
) -> None:
    assert_same_step(two_processes[option, name], step(name, 8, 1, str(tmp_path), **OPTIONS[option]))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_processes_give_the_same_step_of_mixed_examples_and_several_labels(
    problem: str, two_processes: dict[Any, Any], tmp_path: Path
) -> None:
    one, two = step("vit", 8, 1, str(tmp_path), problem), two_processes[problem]
    assert_same_gradients(two["gradients"], one["gradients"])
    assert two["logs"][0] == pytest.approx(one["logs"][0], rel=1e-5)
    # Trainer's own loss of float labels has the examples in it that fill up the last batch of two processes.
    for name, value in one["evaluation"].items():
        if not name.endswith("_loss"):
            assert two["evaluation"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("name", NAMES_OF_SEVERAL_STEPS)
def test_two_processes_train_and_log_as_one(name: str, two_processes: dict[Any, Any], tmp_path: Path) -> None:
    one, two = several_steps(name, 2, str(tmp_path)), two_processes["several steps", name]
    assert one["steps"] == two["steps"] == 6
    assert [entry["step"] for entry in one["logs"]] == [3, 6]
    assert [entry["dkd_weight"] for entry in one["logs"]] == [0.6, 1.0]
    for actual, expected_logs in zip(two["logs"], one["logs"], strict=True):
        assert actual == pytest.approx(expected_logs, rel=1e-5)
    for key, weights in one["weights"].items():
        assert torch.allclose(two["weights"][key], weights, rtol=1e-4, atol=1e-6), key


def test_two_processes_generate_as_one(two_processes: dict[Any, Any], tmp_path: Path) -> None:
    one, two = generation(str(tmp_path)), two_processes["generation"]
    assert len(one["generated"]) == len(one["generated"].unique(dim=0)) == 7, "choose a seed that tells them apart"
    assert torch.equal(two["generated"], one["generated"])
    assert torch.equal(two["labels"], one["labels"])
    assert {"test_loss", "test_tckd", "test_nckd", "test_teacher_agreement"} <= one["metrics"].keys()
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
