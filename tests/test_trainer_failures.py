"""`DKDTrainer` with teachers and students that break: what raises, when, and what the logs say."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_dkd import DKDTrainer, objective, teacher_check

from .test_teacher_check import Event, OnAccelerator
from .trainer_helpers import arguments, images, logs_of, trained, vits, weights_of

NAN, INF = float("nan"), float("inf")


class Breaks:
    """Spoils the logits of a model's `n`-th forward."""

    def __init__(self, model: nn.Module, values: dict[tuple[int, int], float], n: int = 2) -> None:
        self.values, self.n = values, n
        model.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.n -= 1
        if self.n == 0:
            output.logits = output.logits.clone()
            for place, value in self.values.items():
                output.logits[place] = value


# ---- Teachers ----


@pytest.mark.parametrize("spoilt", ["nan", "inf at the target", "inf elsewhere", "no finite non-target logit"])
def test_unusable_teacher_logits_stop_training_before_the_step(tmp_path, spoilt):
    target = images(8)[5]["labels"]
    other = (target + 1) % 4
    values = {
        "nan": {(1, other): NAN},
        "inf at the target": {(1, target): INF},
        "inf elsewhere": {(1, other): INF},
        "no finite non-target logit": {(1, k): -INF for k in range(4) if k != target},
    }[spoilt]
    student, teacher = vits()
    after_one = weights_of(trained(tmp_path, student, images(8), teacher).model)
    student, teacher = vits()
    Breaks(teacher, values)
    with pytest.raises(ValueError, match=r"At step 2 the teacher emitted .*\bpixel_values\b"):
        trained(tmp_path, student, images(8), teacher, max_steps=3)
    assert torch.equal(weights_of(student), after_one)


def evaluated_after_two_steps(path: Any, n: int, **settings: Any) -> DKDTrainer:
    """A trainer at step 2 whose teacher breaks in its `n`-th forward from there on."""
    student, teacher = vits()
    trainer = trained(path, student, images(8), teacher, max_steps=2, eval_with_teacher=True, **settings)
    Breaks(teacher, {(1, 2): NAN}, n)
    return trainer


def test_in_evaluation_they_raise_and_name_the_steps_before(tmp_path):
    trainer = evaluated_after_two_steps(tmp_path, 2)
    with pytest.raises(ValueError, match=r"In evaluation after step 2 the teacher emitted .*\bpixel_values\b"):
        trainer.evaluate(images(10))
    assert math.isfinite(trainer.evaluate(images(10))["eval_tckd"])


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    """A machine without a GPU whose faults stay on a device until they are waited for, or `Event.arrived`."""

    def full(size: tuple[int, ...], value: int, **placement: object) -> torch.Tensor:
        return torch.full(size, value)

    def distil(*args: Any, **options: Any) -> objective.Distilled:
        share = on_cpu(*args, **options)
        faults = share.unusable_teacher.as_subclass(OnAccelerator), share.masking_student.as_subclass(OnAccelerator)
        return share._replace(unusable_teacher=faults[0], masking_student=faults[1])

    on_cpu = objective.distil
    monkeypatch.setattr(objective, "distil", distil)
    monkeypatch.setattr(teacher_check, "torch", SimpleNamespace(full=full, where=torch.where, Event=Event))
    monkeypatch.setattr(Event, "arrived", False)
    return Event


@pytest.mark.parametrize(
    ("broken", "arrived", "stopped_after"),
    # The next step finds a copy that has arrived; a log, or the end of training, waits for it.
    [(1, True, 1), (1, False, 3), (2, False, 3), (4, False, 4)],
)
def test_on_an_accelerator_they_raise_no_later_than_the_next_log_or_the_end(
    tmp_path, accelerator, broken, arrived, stopped_after
):
    accelerator.arrived = arrived
    student, teacher = vits()
    Breaks(teacher, {(1, 2): NAN}, broken)
    args = arguments(tmp_path, max_steps=4, logging_steps=3)
    trainer = DKDTrainer(student, args, train_dataset=images(8), teacher=teacher)
    with pytest.raises(ValueError, match=f"At step {broken} the teacher emitted"):
        trainer.train()
    assert trainer.state.global_step == stopped_after
    assert len(logs_of(trainer)) == (stopped_after == 4)


@pytest.mark.parametrize("n", [1, 3])
def test_on_an_accelerator_they_raise_at_the_end_of_an_evaluation(tmp_path, accelerator, n):
    trainer = evaluated_after_two_steps(tmp_path, n)
    with pytest.raises(ValueError, match="In evaluation after step 2 the teacher emitted"):
        trainer.evaluate(images(10))


def test_on_an_accelerator_good_teachers_train_and_are_evaluated(tmp_path, accelerator):
    trainer = evaluated_after_two_steps(tmp_path, 100)
    accelerator.arrived = True
    assert math.isfinite(trainer.evaluate(images(10))["eval_tckd"])
    trainer.train()
    assert trainer.state.global_step == 2


# ---- Students ----


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_student_that_diverges_is_left_to_trainer(tmp_path, value):
    student, teacher = vits()
    Breaks(student, {(1, 2): value})
    trainer = trained(tmp_path, student, images(8), teacher, max_steps=3)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("ce_weight", [1.0, 0.3])
def test_the_terms_of_a_student_that_diverged_still_add_up(tmp_path, ce_weight, steps):
    def logs(**settings: Any) -> list[dict[str, float]]:
        student, teacher = vits()
        # In the first micro-batch of the second step: from the third on, all weights are NaN.
        Breaks(student, {(1, 2): NAN}, 1 + steps)
        split = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        trainer = trained(
            tmp_path,
            student,
            images(8),
            teacher,
            max_steps=6,
            logging_steps=3,
            ce_weight=ce_weight,
            **split,
            **settings,
        )
        assert weights_of(student).isnan().any()
        return logs_of(trainer)

    first, second = logs()
    for log in (first, second):
        assert all(math.isfinite(log[name]) for name in ("loss", "ce", "dkd", "tckd", "nckd", "teacher_agreement"))
        assert log["loss"] == pytest.approx(ce_weight * log["ce"] + log["dkd"], rel=1e-5, abs=1e-6)
    assert first["dkd"] > 0
    assert second["loss"] == second["ce"] == second["dkd"] == 0
    unfiltered = logs(logging_nan_inf_filter=False)
    assert all(math.isnan(log[name]) for log in unfiltered for name in ("loss", "dkd"))
