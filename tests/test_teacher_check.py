from types import SimpleNamespace

import pytest
import torch

from hf_dkd import teacher_check
from hf_dkd.teacher_check import TeacherCheck

GOOD, BAD = torch.tensor([False, False]), torch.tensor([False, True])
COLUMNS = ["input_ids", "attention_mask"]


class OnAccelerator(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = SimpleNamespace(type="cuda")


class Event:
    """What `torch.Event` is to a copy that arrives when `arrived` says so."""

    arrived = False

    def __init__(self, device: object) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Event.arrived


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    """A machine without a GPU that runs the code for one."""

    def full(size: tuple[int, ...], value: int, **placement: object) -> torch.Tensor:
        return torch.full(size, value)

    monkeypatch.setattr(teacher_check, "torch", SimpleNamespace(full=full, where=torch.where, Event=Event))
    monkeypatch.setattr(Event, "arrived", False)
    return Event


def on_accelerator(unusable: torch.Tensor) -> torch.Tensor:
    return unusable.as_subclass(OnAccelerator)


def test_on_a_cpu_it_raises_at_once_with_step_and_columns() -> None:
    check = TeacherCheck()
    check.update(GOOD, GOOD, "At step 16", COLUMNS)
    check.raise_if_bad(wait=True)
    with pytest.raises(ValueError, match=r"At step 17 the teacher emitted.*NaN.*columns input_ids, attention_mask\."):
        check.update(BAD, GOOD, "At step 17", COLUMNS)


def test_a_batch_without_rows_is_usable() -> None:
    none = torch.zeros(0, dtype=torch.bool)
    TeacherCheck().update(none, none, "At step 1", COLUMNS)


def test_on_an_accelerator_it_raises_when_the_copy_has_arrived(accelerator: type[Event]) -> None:
    check = TeacherCheck()
    check.update(on_accelerator(BAD), on_accelerator(GOOD), "At step 3", COLUMNS)
    check.update(on_accelerator(BAD), on_accelerator(GOOD), "At step 4", COLUMNS)
    check.raise_if_bad(wait=False)
    accelerator.arrived = True
    with pytest.raises(ValueError, match=r"At step 3 .* columns input_ids"):
        check.update(on_accelerator(GOOD), on_accelerator(GOOD), "At step 5", COLUMNS)


def test_on_an_accelerator_it_raises_at_the_latest_when_waited_for(accelerator: type[Event]) -> None:
    check = TeacherCheck()
    for step in range(1, 5):
        check.update(on_accelerator(GOOD), on_accelerator(GOOD), f"At step {step}", COLUMNS)
    check.raise_if_bad(wait=True)
    check.update(on_accelerator(BAD), on_accelerator(GOOD), "At step 5", COLUMNS)
    check.update(on_accelerator(BAD), on_accelerator(GOOD), "At step 6", COLUMNS)
    check.update(on_accelerator(GOOD), on_accelerator(GOOD), "At step 7", COLUMNS)
    with pytest.raises(ValueError, match="At step 5 "):
        check.raise_if_bad(wait=True)


def test_a_student_that_masks_what_the_teacher_does_not_is_named_as_the_one_at_fault() -> None:
    with pytest.raises(ValueError, match=r"In evaluation after step 4 the student masked .*columns input_ids"):
        TeacherCheck().update(GOOD, BAD, "In evaluation after step 4", COLUMNS)


def test_on_an_accelerator_the_message_is_that_of_the_first_fault(accelerator: type[Event]) -> None:
    check = TeacherCheck()
    check.update(on_accelerator(GOOD), on_accelerator(BAD), "At step 1", ["pixel_values"])
    check.update(on_accelerator(BAD), on_accelerator(GOOD), "At step 2", COLUMNS)
    with pytest.raises(ValueError, match=r"At step 1 the student masked .*columns pixel_values\."):
        check.raise_if_bad(wait=True)


def test_on_an_accelerator_a_fault_is_told_once(accelerator: type[Event]) -> None:
    check = TeacherCheck()
    check.update(on_accelerator(BAD), on_accelerator(GOOD), "At step 1", COLUMNS)
    with pytest.raises(ValueError, match="At step 1 "):
        check.raise_if_bad(wait=True)
    check.update(on_accelerator(GOOD), on_accelerator(GOOD), "At step 2", COLUMNS)
    check.raise_if_bad(wait=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_raises_no_later_than_it_is_waited_for() -> None:
    check = TeacherCheck()
    check.update(GOOD.cuda(), GOOD.cuda(), "At step 1", COLUMNS)
    check.raise_if_bad(wait=True)
    check.update(BAD.cuda(), GOOD.cuda(), "At step 2", COLUMNS)
    with pytest.raises(ValueError, match="At step 2 "):
        check.raise_if_bad(wait=True)
