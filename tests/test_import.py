"""What `import hf_dkd` does and does not do, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import hf_dkd

ROOT = Path(hf_dkd.__file__).parents[1]
WHAT_IS_NEW = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("an import opened a connection")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse

import accelerate, datasets, torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

before = set(sys.modules)
import hf_dkd

print(*sorted({module.partition(".")[0] for module in set(sys.modules) - before}))
"""


def test_it_imports_nothing_that_trainer_does_not_and_opens_no_connection() -> None:
    online = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", WHAT_IS_NEW], cwd=ROOT, env=online, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hf_dkd"]


def test_public_names_are_there() -> None:
    assert hf_dkd.__all__ == [
        "CachedTeacher",
        "DKDArgumentsMixin",
        "DKDMixin",
        "DKDSeq2SeqTrainer",
        "DKDSeq2SeqTrainingArguments",
        "DKDTrainer",
        "DKDTrainingArguments",
        "DataCollatorForMixup",
        "DataCollatorWithTeacherInputs",
        "Teacher",
        "cache_teacher_outputs",
        "decoupled_kl",
        "dkd_loss",
        "fused_linear_dkd_loss",
        "kd_loss",
    ]
    assert all(hasattr(hf_dkd, name) for name in hf_dkd.__all__)
