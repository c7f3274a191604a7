"""Under FSDP2 the head's weights are whole within the student's forward, where the fused loss is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer_helpers import assert_close

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("sharded") / "results.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "-m", "tests.distributed.sharded", str(output)], cwd=ROOT, env=environment, check=True)
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_step_is_that_of_the_logits(results: dict[str, dict[str, torch.Tensor]], tied: bool) -> None:
    fused, plain = results[f"{tied} True"], results[f"{tied} False"]
    assert fused.keys() == plain.keys()
    assert ("lm_head.weight" in plain) != tied
    for name, value in plain.items():
        assert value.norm() > 0
        assert_close(fused[name], value, 2e-5)
