"""Launching a recipe as a user does, through `accelerate launch`, and reading what it leaves."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser

RECIPES = Path(__file__).parents[2] / "recipes"
_ONE_PROCESS = ("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
_TWO_PROCESSES = ("--config_file", str(RECIPES / "accelerate/cpu_two_processes.yaml"))
_QUICK = {"report_to": "none", "logging_steps": 1, "use_cpu": True, "dataloader_pin_memory": False}


def command(recipe: str, processes: int = 1, **options: Any) -> list[str]:
    """The command line that launches `recipe` with these options; True and False as words, None left out."""
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--dynamo_backend", "no"]
    launch += _ONE_PROCESS if processes == 1 else _TWO_PROCESSES
    given = {name: value for name, value in (_QUICK | options).items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *launch, str(RECIPES / recipe), *words]


def environment() -> dict[str, str]:
    """The variables that recipes run with here: one thread, no Hub."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(recipe: str, processes: int = 1, **options: Any) -> dict[str, Any]:
    """Run `recipe` to its end; its results.json."""
    done = subprocess.run(
        command(recipe, processes, **options), env=environment(), capture_output=True, text=True, check=False
    )
    # Of two processes one was seen to abort as its interpreter ended, like https://github.com/pytorch/pytorch/pull/179291
    # tells of: only after the recipe's last line is that let pass.
    aborted = processes > 1 and "terminate called without an active exception" in done.stderr
    finished = f"Wrote the model, results.json and predictions.parquet to {options['output_dir']}." in done.stdout
    assert finished, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.returncode == 0 or aborted, done.stdout[-2000:] + done.stderr[-6000:]
    results = json.loads((Path(options["output_dir"]) / "results.json").read_text())
    assert results["processes"] == processes
    return results


def complaint(recipe: str, **options: Any) -> str:
    """The one line that `recipe` stops with for options that are wrong, without the launcher, which adds nothing."""
    words = command(recipe, **options)
    direct = [sys.executable, *words[words.index(str(RECIPES / recipe)) :]]
    done = subprocess.run(direct, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if f"{recipe}: error:" in line]
    assert len(lines) == 1, done.stderr[-4000:]
    return lines[0]


def kill_after_checkpoint(recipe: str, **options: Any) -> None:
    """Run `recipe` and kill it, with SIGKILL, once it has written a checkpoint and before it is done."""
    output = Path(options["output_dir"])
    process = subprocess.Popen(
        command(recipe, **options), env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not any(output.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the recipe ended before it wrote a checkpoint"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "results.json").exists(), "the recipe ended before it was killed"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights saved in `folder`."""
    return load_file(folder / "model.safetensors")


def recipe(name: str) -> Any:
    """A recipe as a module, for what needs no process of its own."""
    if str(RECIPES) not in sys.path:
        sys.path.insert(0, str(RECIPES))
    return importlib.import_module(name)


def run_here(name: str, **options: Any) -> dict[str, Any]:
    """Run a recipe in this process, which spares the imports of a launch; its results.json."""
    words = command(f"{name}.py", **options)
    with patch.object(sys, "argv", words[words.index(str(RECIPES / f"{name}.py")) :]):
        recipe(name).main()
    return json.loads((Path(options["output_dir"]) / "results.json").read_text())


def built(name: str, **options: Any) -> tuple[Any, Any]:
    """What `build` of a recipe makes of these options, in this process."""
    module = recipe(name)
    given = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1} | options
    given = {option: str(value) if isinstance(value, Path) else value for option, value in given.items()}
    return module.build(*HfArgumentParser(module.ARGUMENTS).parse_dict(given))
