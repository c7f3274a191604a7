"""A cache whose making is killed. `python -m tests.killed_cache OUTPUT_DIR forward|fsync COUNT`"""

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import Dataset

from hf_dkd import cache_shards, cache_teacher_outputs
from tests.cache_helpers import rows_of
from tests.models import ARCHITECTURES


def make(output_dir: Path, hook: Any = None) -> Dataset:
    """24 rows in four shards of three batches."""
    teacher = ARCHITECTURES["bert"].model(seed=1)
    if hook is not None:
        teacher.register_forward_hook(hook)
    with patch.object(cache_shards, "_SHARD_BATCHES", 3):
        return cache_teacher_outputs(teacher, rows_of("bert", seeds=3), output_dir, batch_size=2, dtype="float32")


if __name__ == "__main__":
    left = int(sys.argv[3])

    def count(*args: Any) -> None:
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    if sys.argv[2] == "forward":
        make(Path(sys.argv[1]), count)
    else:
        with patch("os.fsync", count):
            make(Path(sys.argv[1]))
