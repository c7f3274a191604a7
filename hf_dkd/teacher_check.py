"""Watching what the teacher emits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BY_TEACHER = (
    "the teacher emitted a row of logits that cannot be distilled: NaN, +inf, or no finite non-target logit. It read "
    "the columns {columns}. Check the teacher's dtype (float16 overflows), its weights and these inputs."
)
_BY_STUDENT = (
    "the student masked (-inf) a class to which the teacher gives mass, so that the divergence is infinite. The "
    "teacher read the columns {columns}. Mask the class in its logits too, or leave it unmasked in the student's."
)


class TeacherCheck:
    """Raises where a row cannot be distilled: at once on a CPU, without stalling an accelerator elsewhere.

    On an accelerator the first fault is kept in a device scalar that is copied to the host without blocking, and read
    when the copy has arrived, at the latest when `wait` asks for it.
    """

    def __init__(self) -> None:
        self._first_fault: Tensor | None = None
        self._on_host: Tensor | None = None
        self._arrived: Any = None
        # Two messages for each update, one for the teacher's fault and one for the student's.
        self._messages: list[str] = []

    def update(self, of_teacher: Tensor, of_student: Tensor, moment: str, columns: Sequence[str]) -> None:
        """Note whether any row is at fault, (R,) booleans each, at a `moment` such as "At step 3"."""
        read = ", ".join(columns)
        messages = [f"{moment} {message.format(columns=read)}" for message in (_BY_TEACHER, _BY_STUDENT)]
        if of_teacher.device.type == "cpu":
            for fault, message in zip((of_teacher, of_student), messages, strict=True):
                if fault.any():
                    raise ValueError(message)
            return
        self.raise_if_bad(wait=False)
        if self._first_fault is None:
            self._first_fault = torch.full((), -1, device=of_teacher.device)
            self._on_host = torch.full((), -1, pin_memory=of_teacher.device.type == "cuda")
        index = len(self._messages)
        self._messages += messages
        fault = torch.where(of_teacher.any(), index, torch.where(of_student.any(), index + 1, -1))
        self._first_fault = torch.where(self._first_fault < 0, fault, self._first_fault)
        if self._arrived is None and self._on_host is not None:
            self._on_host.copy_(self._first_fault, non_blocking=True)
            self._arrived = torch.Event(of_teacher.device)
            self._arrived.record()

    def raise_if_bad(self, *, wait: bool) -> None:
        """Raise for a fault that is known; `wait` reads the device to know of all."""
        if self._first_fault is None or self._on_host is None:
            return
        if wait:
            self._arrived, first = None, int(self._first_fault.item())
        elif self._arrived is not None and self._arrived.query():
            self._arrived, first = None, int(self._on_host.item())
        else:
            return
        if first >= 0:
            raise ValueError(self._messages[first])
        if wait:
            self._messages.clear()
