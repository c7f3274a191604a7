"""Triton reads TRITON_INTERPRET when it is imported, which the libraries under the trainer do."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
