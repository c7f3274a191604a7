"""The launch configurations: accelerate reads each, and their comments name a command that starts them."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from .launching import RECIPES

EXPECTED = {
    "cpu_two_processes": ("MULTI_GPU", 2),
    "ddp": ("MULTI_GPU", 8),
    "fsdp2": ("FSDP", 8),
    "one_gpu": ("NO", 1),
    "zero2": ("DEEPSPEED", 8),
    "zero3": ("DEEPSPEED", 8),
}


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert sorted(path.stem for path in (RECIPES / "accelerate").iterdir()) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name: str) -> None:
    path = RECIPES / f"accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_processes) == EXPECTED[name]
    assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in path.read_text()
    assert config.use_cpu is (name == "cpu_two_processes")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
