"""A run that is killed and resumed ends in the weights of one that was not, bit for bit."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import torch

from .killed import trainer

ROOT = Path(__file__).parents[2]


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = trainer(str(tmp_path / "whole"))
    whole.train()
    assert whole.state.global_step == 12

    step = random.Random().randint(3, 11)
    command = [sys.executable, "-m", "tests.distributed.killed", str(tmp_path / "killed"), str(step)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL

    resumed = trainer(str(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=True)
    for (name, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected), f"{name} differs after a kill at step {step}"
    weights = {log["step"]: log["dkd_weight"] for log in resumed.state.log_history if "dkd_weight" in log}
    assert weights == {k: min(1.0, k / 8) for k in range(1, 13)}
