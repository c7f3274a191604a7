"""The folders of `paper_cifar100.py`: each is kept for one training, which may go on there another time."""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from common import fail
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from hf_dkd.time_limit import TimeLimit, last_checkpoint, stop_script

# What may differ once a training is finished, and not before. A batch is divided among processes.
HOW_IT_RUNS = frozenset({"processes", "batch_size", "mixed_precision"})


def finished(folder: str) -> bool:
    """Whether a training came to its end there, by the state that is written after the weights."""
    try:
        state = json.loads(Path(folder, "trainer_state.json").read_text())
    except (OSError, ValueError):  # none, or one whose writing was interrupted
        return False
    return state["global_step"] >= state["max_steps"]


def _has_begun(folder: str) -> bool:
    return bool(last_checkpoint(folder)) or Path(folder, "trainer_state.json").exists()


def refuse_another(folder: str, settings: dict[str, Any], free: Set[str] = frozenset(), held: bool = False) -> None:
    """Stop with one line where the folder holds a training with other settings, or one that is not of this recipe.

    Its checkpoints would be taken for those of this training. The settings in `free` may be others. `held` says that
    another run trains there, which may not have written a checkpoint yet.
    """
    file, settings = Path(folder, "training.json"), json.loads(json.dumps(settings, default=str))
    if not _has_begun(folder) and not (held and file.exists()):
        return
    if not file.exists():
        fail(f"{folder} holds a training that paper_cifar100.py did not begin: choose another folder.")
    there = json.loads(file.read_text())
    changed = {name for name in there | settings if there.get(name) != settings.get(name)}
    changed -= free | (HOW_IT_RUNS if finished(folder) else set())  # nothing is trained any more
    if changed:
        differences = ", ".join(f"{name} {there.get(name)} and not {settings.get(name)}" for name in sorted(changed))
        fail(f"{folder} holds a training with {differences}: start that one, choose another folder, or remove it.")


def reserve(folder: str, settings: dict[str, Any]) -> None:
    """Keep the folder for a training with these settings, or stop where it is kept for another one."""
    refuse_another(folder, settings)
    if _has_begun(folder):
        return
    file = Path(folder, "training.json")
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(settings, indent=2, default=str))
    written.replace(file)  # other processes read it


def on_main(ask: Callable[[], bool]) -> bool:
    """What the main process finds: all must do the same, and another run may change the folder in between."""
    processes = PartialState()
    found = [processes.is_main_process and ask()]
    if processes.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


@contextmanager
def kept_for(folder: str, settings: dict[str, Any], limit: TimeLimit | None = None) -> Iterator[None]:
    """Keep the folder for a training with these settings, while no other run trains there; the lock ends with its run.

    Raises:
        SystemExit: with one line, where the folder is kept for another training; with code 0 where the time ends while
            another run trains there.
    """
    refuse_another(folder, settings, free=HOW_IT_RUNS)  # without waiting
    Path(folder).mkdir(parents=True, exist_ok=True)
    # Trainer pushes no file whose name begins so.
    lock, waits = FileLock(Path(folder, "_training.lock")), False

    def acquired() -> bool:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            return False
        return True

    while not on_main(acquired):  # in turns: a process group does not wait for hours
        refuse_another(folder, settings, free=HOW_IT_RUNS, held=True)
        if limit and limit.is_over():
            stop_script(f"Out of time, as another run trains in {folder}: the same command goes on from there.")
        if not waits and PartialState().is_main_process:
            print(f"Waiting for another run, which trains in {folder}.", flush=True)
        waits = True
    try:
        reserve(folder, settings)
        yield
    finally:
        lock.release()


def checkpoint_to_resume(folder: str, asked: str | None = "last") -> str | None:
    """The checkpoint that a training goes on from; None for the start. One that is not whole stops the script."""
    checkpoint = last_checkpoint(folder) if asked == "last" else asked
    if checkpoint is None:
        return None
    if not Path(checkpoint, "trainer_state.json").exists():
        fail(f"--resume_from_checkpoint {checkpoint} has no trainer_state.json: name a folder checkpoint-N, or 'last'.")
    for file in sorted(Path(checkpoint).iterdir()):
        if not _is_whole(file):
            fail(f"{file} is not whole: remove {checkpoint}; the training goes on from the checkpoint before, if any.")
    return checkpoint


def _is_whole(file: Path) -> bool:
    """Whether a file of tensors was written to its end; others count as whole."""
    if file.suffix in (".bin", ".pt", ".pth"):
        return zipfile.is_zipfile(file)
    if file.suffix == ".safetensors":
        try:
            safe_open(file, "pt")
        except SafetensorError:
            return False
    return True
