"""Watching what the teacher emits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TeacherCheck:
    """Raises when the teacher emitted an unusable row: at once on a CPU, without stalling an accelerator elsewhere.

    On an accelerator the first bad step is kept in a device scalar that is copied to the host without blocking, and
    read when the copy has arrived, at the latest when `wait` asks for it.
    """

    def __init__(self) -> None:
        self._first_bad_step: Tensor | None = None
        self._on_host: Tensor | None = None
        self._arrived: Any = None
        self._columns = ""

    def update(self, unusable: Tensor, step: int, columns: Sequence[str]) -> None:
        """Note whether any row is unusable at optimizer step `step`, in which the teacher read `columns`."""
        self._columns = ", ".join(columns)
        if unusable.device.type == "cpu":
            if unusable.any():
                self._raise(step)
            return
        self.raise_if_bad(wait=False)
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), -1, device=unusable.device)
            self._on_host = torch.full((), -1, pin_memory=unusable.device.type == "cuda")
        first = unusable.any() & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(first, step, self._first_bad_step)
        if self._arrived is None and self._on_host is not None:
            self._on_host.copy_(self._first_bad_step, non_blocking=True)
            self._arrived = torch.Event(unusable.device)
            self._arrived.record()

    def raise_if_bad(self, *, wait: bool) -> None:
        """Raise for a bad step that is known; `wait` reads the device to know of all."""
        if self._first_bad_step is None or self._on_host is None:
            return
        if wait:
            self._arrived, step = None, int(self._first_bad_step.item())
        elif self._arrived is not None and self._arrived.query():
            self._arrived, step = None, int(self._on_host.item())
        else:
            return
        if step >= 0:
            self._raise(step)

    def _raise(self, step: int) -> None:
        raise ValueError(
            f"At step {step} the teacher emitted a row of logits that cannot be distilled: NaN, +inf, no finite "
            "non-target logit, or mass on a class that the student masks. The teacher read the columns "
            f"{self._columns}. Check the teacher's dtype (float16 overflows), its weights and these inputs."
        )
