"""A run that is killed and resumed ends in the weights of one that was not, bit for bit."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .killed import trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_killed_run_resumes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    whole = trainer(str(tmp_path / "whole"), name)
    whole.train()
    assert whole.state.global_step == 12

    step = random.Random().randint(3, 11)
    command = [sys.executable, "-m", "tests.distributed.killed", str(tmp_path / "killed"), str(step), name]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL

    resumed = trainer(str(tmp_path / "killed"), name)
    resumed.train(resume_from_checkpoint=True)
    for (parameter, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected), f"{parameter} differs after a kill at step {step}"
    weights = {log["step"]: log["dkd_weight"] for log in resumed.state.log_history if "dkd_weight" in log}
    assert weights == {k: min(1.0, k / 8) for k in range(1, 13)}
