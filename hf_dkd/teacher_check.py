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
        self._updates: list[tuple[str, Sequence[str]]] = []

    def update(self, of_teacher: Tensor, of_student: Tensor, moment: str, columns: Sequence[str]) -> None:
        """Note whether any row is at fault, (R,) booleans each, at a `moment` such as "At step 3"."""
        if of_teacher.device.type == "cpu":
            for fault, message in ((of_teacher, _BY_TEACHER), (of_student, _BY_STUDENT)):
                if fault.any():
                    raise ValueError(f"{moment} {message.format(columns=', '.join(columns))}")
            return
        self.raise_if_bad(wait=False)
        if self._first_fault is None:
            self._first_fault = torch.full((), -1, device=of_teacher.device)
            self._on_host = torch.full((), -1, pin_memory=of_teacher.device.type == "cuda")
        # One number tells the update and whose fault it was.
        code = 2 * len(self._updates)
        self._updates.append((moment, columns))
        fault = torch.where(of_teacher.any(), code, torch.where(of_student.any(), code + 1, -1))
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
        updates = self._updates
        if wait or first >= 0:
            self._updates, self._first_fault, self._on_host, self._arrived = [], None, None, None
        if first >= 0:
            moment, columns = updates[first // 2]
            message = _BY_STUDENT if first % 2 else _BY_TEACHER
            raise ValueError(f"{moment} {message.format(columns=', '.join(columns))}")
