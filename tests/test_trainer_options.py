"""`DKDTrainer`: the keywords that are Trainer's, the forms in which a teacher is given, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertForTokenClassification, ViTForImageClassification

from hf_dkd import DKDTrainer

from .models import ARCHITECTURES
from .trainer_helpers import (
    Gradients,
    arguments,
    first_gradient,
    images,
    in_rows,
    logs_of,
    tiny,
    vits,
    weights_of,
)

# ---- Optimizers ----


def moved(trainer: DKDTrainer) -> tuple[Tensor, Tensor]:
    """How far a step moves the student, and its gradient."""
    gradients, before = Gradients(), weights_of(trainer.model)
    trainer.add_callback(gradients)
    trainer.train()
    return before - weights_of(trainer.model), gradients.steps[0]


def test_an_optimizer_and_its_schedule_are_those_that_are_given(tmp_path):
    student, teacher = vits()
    optimizer = SGD(student.parameters(), lr=0.5)
    schedule = LambdaLR(optimizer, lambda step: 0.25)
    args = arguments(tmp_path, learning_rate=7.0)
    trainer = DKDTrainer(student, args, train_dataset=images(4), optimizers=(optimizer, schedule), teacher=teacher)
    step, gradient = moved(trainer)
    torch.testing.assert_close(step, 0.125 * gradient, rtol=1e-4, atol=1e-6)
    assert schedule.last_epoch == 1


def test_an_optimizer_class_gets_its_keywords_and_the_students_parameters(tmp_path):
    student, teacher = vits()
    trainer = DKDTrainer(
        student, arguments(tmp_path, learning_rate=7.0), train_dataset=images(4), teacher=teacher,
        optimizer_cls_and_kwargs=(SGD, {"lr": 0.5}),
    )  # fmt: skip
    step, gradient = moved(trainer)
    torch.testing.assert_close(step, 0.5 * gradient, rtol=1e-4, atol=1e-6)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in student.parameters()}


# ---- Counting ----


@pytest.mark.parametrize("name", ["bert_tokens", "llama", "vit"])
def test_on_one_process_tokens_need_no_averaging(tmp_path, name):
    architecture, examples = ARCHITECTURES[name], in_rows(ARCHITECTURES[name].batch())

    def run(**settings: Any) -> tuple[Tensor, dict[str, float], float]:
        args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
        trainer = DKDTrainer(architecture.model(0), args, train_dataset=examples, teacher=architecture.model(1))
        evaluated = trainer.evaluate(examples)["eval_loss"]
        return first_gradient(trainer), logs_of(trainer)[0], evaluated

    (gradient, *numbers), (expected, *expected_numbers) = run(average_tokens_across_devices=False), run()
    assert torch.equal(gradient, expected)
    assert numbers == expected_numbers


# ---- The teacher ----


@pytest.mark.parametrize("teacher", [3, ["teacher"], ViTForImageClassification])
def test_what_is_no_teacher_is_refused_by_what_would_be(tmp_path, teacher):
    with pytest.raises(TypeError, match=f"teacher is a {type(teacher).__name__}; expected a module, a path or Hub id,"):
        DKDTrainer(tiny(ViTForImageClassification), arguments(tmp_path), teacher=teacher)


@pytest.mark.parametrize("size", ["get_cp_size", "get_sp_size"])
def test_parallelism_that_splits_sequences_is_refused(tmp_path, monkeypatch, size):
    monkeypatch.setattr(DKDTrainer, size, lambda trainer: 2)
    student, teacher = tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1)
    with pytest.raises(ValueError, match="context or sequence parallelism, which split the rows"):
        DKDTrainer(student, arguments(tmp_path), teacher=teacher)
    DKDTrainer(student, arguments(tmp_path))
