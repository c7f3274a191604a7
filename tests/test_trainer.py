"""`DKDTrainer` and `DKDSeq2SeqTrainer`: construction, the loss of a step, the teacher's isolation, the logs."""

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

from hf_dkd import DKDSeq2SeqTrainer, DKDTrainer

from . import oracle
from .trainer_helpers import (
    PutsInTrainMode,
    arguments,
    assert_close,
    expected_logs,
    first_gradient,
    forwards,
    images,
    labelled_logits,
    logs_of,
    sentences,
    tiny,
    trained,
    vits,
    weights_of,
)

SETTINGS = [
    {},
    {"alpha": 0.5, "beta": 4.0, "temperature": 4.0},
    {"alpha": 0.0, "beta": 2.0, "temperature": 2.0},
    {"alpha": 3.0, "beta": 0.0, "temperature": 0.5},
]


# ---- One step ----


def test_plain_training_arguments_are_enough(tmp_path):
    student, teacher = vits()
    expected = expected_logs(student, teacher, images(4))
    trainer = DKDTrainer(student, arguments(tmp_path, TrainingArguments), train_dataset=images(4), teacher=teacher)
    trainer.train()
    (log,) = logs_of(trainer)
    assert {name: log[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert log["dkd_weight"] == 1


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("model", "examples"), [(ViTForImageClassification, images), (BertForSequenceClassification, sentences)]
)
def test_the_loss_and_gradient_of_a_step_are_the_oracles(tmp_path, model, examples, settings):
    student, teacher = tiny(model, 0), tiny(model, 1)
    expected = expected_logs(student, teacher, examples(4), **settings)
    logits, labels = labelled_logits(student, examples(4))
    rows = oracle.dkd(logits, labelled_logits(teacher, examples(4))[0], labels, **settings)
    gradients = torch.autograd.grad(
        (cross_entropy(logits, labels) + rows.mean()), list(student.parameters()), allow_unused=True
    )

    args = arguments(tmp_path, **{f"dkd_{name}": value for name, value in settings.items()})
    trainer = DKDTrainer(student, args, train_dataset=examples(4), teacher=teacher)
    gradient = first_gradient(trainer)
    assert_close(gradient, torch.cat([g.flatten() for g in gradients]))
    assert {name: logs_of(trainer)[0][name] for name in expected} == pytest.approx(expected, abs=2e-5, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_classical_distillation_is_the_oracles_kl(tmp_path, temperature):
    student, teacher = vits()
    with torch.no_grad():
        (logits, labels), (teacher_logits, _) = labelled_logits(student, images(4)), labelled_logits(teacher, images(4))
    tckd, nckd, kl, _ = (
        value.mean().item() for value in oracle.divergences(logits, teacher_logits, labels, temperature)
    )
    settings = {"distillation": "kd", "dkd_alpha": 0.7, "dkd_temperature": temperature, "ce_weight": 0.1}
    (log,) = logs_of(trained(tmp_path, student, images(4), teacher, **settings))
    assert log["dkd"] == pytest.approx(0.7 * temperature**2 * kl, rel=1e-5)
    assert log["loss"] == pytest.approx(0.1 * cross_entropy(logits, labels).item() + log["dkd"], rel=1e-5)
    assert (log["tckd"], log["nckd"]) == pytest.approx((tckd, nckd), rel=1e-5)


# ---- Construction ----


@pytest.mark.parametrize(("ours", "theirs"), [(DKDTrainer, Trainer), (DKDSeq2SeqTrainer, Seq2SeqTrainer)])
def test_parameters_are_those_of_trainer_then_teacher(ours, theirs):
    *same, teacher = inspect.signature(ours).parameters.values()
    expected = inspect.signature(theirs).parameters.values()
    assert [(p.name, p.default, p.kind) for p in same] == [(p.name, p.default, p.kind) for p in expected]
    assert (teacher.name, teacher.default) == ("teacher", None)


@pytest.mark.parametrize("by", ["argument", "setting"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_teacher_is_loaded_by_path(tmp_path, kind, by):
    student, teacher = vits()
    teacher.save_pretrained(tmp_path / "teacher")
    expected = expected_logs(student, teacher, images(4))
    path = kind(tmp_path / "teacher")
    given = {"teacher": path} if by == "argument" else {"teacher_model_name_or_path": path}
    trainer = trained(tmp_path, student, images(4), **given)
    assert logs_of(trainer)[0]["dkd"] == pytest.approx(expected["dkd"], rel=1e-5)
    assert trainer.teacher.name == str(path)


def test_a_teacher_given_twice_is_refused(tmp_path):
    student, teacher = vits()
    with pytest.raises(ValueError, match="give one of the two"):
        DKDTrainer(student, arguments(tmp_path, teacher_model_name_or_path="somewhere"), teacher=teacher)


def test_the_bare_student_is_refused_as_its_own_teacher(tmp_path):
    student, _ = vits()
    with pytest.raises(ValueError, match=r"Teacher\.from_adapter"):
        DKDTrainer(student, arguments(tmp_path), teacher=student)


def test_data_parallel_is_refused_with_the_line_to_use(tmp_path):
    student, teacher = vits()
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch --num_processes 2"):
        DKDTrainer(student, args, teacher=teacher)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dkd_temperature", 0.0),
        ("dkd_temperature", float("nan")),
        ("dkd_alpha", -1.0),
        ("ce_weight", -1.0),
        ("dkd_warmup_steps", 2.5),
        ("distillation", "hinton"),
        ("dkd_head", "tail"),
    ],
)
def test_settings_changed_after_construction_are_checked_before_training(tmp_path, name, value):
    student, teacher = vits()
    before = weights_of(student)
    trainer = DKDTrainer(student, arguments(tmp_path), train_dataset=images(4), teacher=teacher)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=name):
        trainer.train()
    assert torch.equal(weights_of(student), before)


# ---- Without a teacher ----


@pytest.mark.parametrize(
    ("model", "examples"), [(ViTForImageClassification, images), (BertForSequenceClassification, sentences)]
)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1, "max_grad_norm": 1.0}])
def test_without_a_teacher_it_is_trainer_bit_for_bit(tmp_path, caplog, model, examples, settings):
    def run(trainer_class: type[Trainer]) -> Trainer:
        args = arguments(
            tmp_path,
            optim="adamw_torch",
            max_steps=6,
            train_sampling_strategy="random",
            eval_strategy="steps",
            **settings,
        )
        trainer = trainer_class(tiny(model), args, train_dataset=examples(20), eval_dataset=examples(6, seed=1))
        trainer.train()
        return trainer

    def numbers(trainer: Trainer) -> list[dict[str, float]]:
        timed = ("runtime", "per_second", "preparation_time")
        return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history]

    with caplog.at_level(logging.WARNING, logger="hf_dkd"):
        ours, theirs = run(DKDTrainer), run(Trainer)
    assert torch.equal(weights_of(ours.model), weights_of(theirs.model))
    assert numbers(ours) == numbers(theirs)
    assert [r.message.split(":")[0] for r in caplog.records if r.name.startswith("hf_dkd")] == ["No teacher"]


def test_without_a_teacher_accumulation_equals_the_full_batch(tmp_path):
    def gradient(trainer_class: type[Trainer], **settings: Any) -> torch.Tensor:
        model, args = tiny(BertForSequenceClassification), arguments(tmp_path, **settings)
        return first_gradient(trainer_class(model, args, train_dataset=sentences(8)))

    whole = gradient(Trainer, per_device_train_batch_size=8)
    parts = gradient(DKDTrainer, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_close(parts, whole)


# ---- The teacher ----


@pytest.mark.parametrize(
    ("settings", "training", "evaluation"),
    [
        ({}, 4, 0),
        ({"distillation": "kd"}, 4, 0),
        ({"dkd_alpha": 0.0, "dkd_beta": 0.0}, 0, 0),
        ({"distillation": "kd", "dkd_alpha": 0.0}, 0, 0),
        ({"eval_with_teacher": True}, 4, 2),
        ({"include_for_metrics": ["teacher_logits"]}, 4, 2),
        ({"eval_with_teacher": True, "include_for_metrics": ["teacher_logits"]}, 4, 2),
    ],
)
def test_each_model_runs_once_for_each_micro_batch(tmp_path, settings, training, evaluation):
    student, teacher = vits()
    of_student, of_teacher = forwards(student), forwards(teacher)
    trainer = trained(tmp_path, student, images(16), teacher, gradient_accumulation_steps=2, max_steps=2, **settings)
    assert (len(of_student), len(of_teacher)) == (4, training)
    trainer.compute_metrics = lambda prediction: {}
    trainer.evaluate(images(8))
    assert (len(of_student) - 4, len(of_teacher) - training) == (2, evaluation)


def test_the_teacher_is_frozen_and_saved_nowhere(tmp_path):
    student, teacher = vits()
    names, before = set(student.state_dict()), weights_of(teacher)
    student.save_pretrained(tmp_path / "alone")
    modes: list[tuple[bool, bool]] = []
    teacher.register_forward_pre_hook(lambda module, args: modes.append((module.training, torch.is_grad_enabled())))
    teacher.train()
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = DKDTrainer(student, args, train_dataset=images(8), teacher=teacher)
    trainer.add_callback(PutsInTrainMode(teacher))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))

    assert modes == [(False, False)] * 2
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert torch.equal(weights_of(teacher), before)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in student.parameters()}
    assert set(trainer.model.state_dict()) == names
    alone, *others = (
        set(load_file(tmp_path / folder / "model.safetensors"))
        for folder in ("alone", "checkpoint-1", "checkpoint-2", "saved")
    )
    assert others == [alone] * 3


# ---- Logs ----


@pytest.mark.parametrize("settings", SETTINGS)
def test_logs_are_means_over_the_steps_since_the_last_log(tmp_path, settings):
    student, teacher = vits()
    # Epochs of 20 examples, two micro-batches of 4 a step: steps of 8, 8 and 4 rows. No learning, so that they add up.
    steps = [expected_logs(student, teacher, images(20)[start : start + 8], **settings) for start in (0, 8, 16)]
    expected = {name: sum(step[name] for step in steps) / 3 for name in steps[0]}
    trainer = trained(
        tmp_path, student, images(20), teacher, learning_rate=0.0, gradient_accumulation_steps=2, max_steps=6,
        logging_steps=3, **{f"dkd_{name}": value for name, value in settings.items()},
    )  # fmt: skip
    logs = logs_of(trainer)
    assert len(logs) == 2
    alpha, beta, temperature = (settings.get(name, 1.0) for name in ("alpha", "beta", "temperature"))
    for log in logs:
        assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert log["loss"] == pytest.approx(log["ce"] + log["dkd"], abs=1e-5)
        assert log["dkd"] == pytest.approx(temperature**2 * (alpha * log["tckd"] + beta * log["nckd"]), rel=1e-5)
        assert all(round(log[name], 6) != log[name] for name in ("loss", "ce", "tckd", "nckd", "dkd"))


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path, ce_weight):
    student, teacher = vits()
    expected = expected_logs(student, teacher, images(4))
    (log,) = logs_of(trained(tmp_path, student, images(4), teacher, ce_weight=ce_weight))
    assert log["ce"] == pytest.approx(expected["ce"], rel=1e-5)
    assert log["loss"] == pytest.approx(ce_weight * expected["ce"] + expected["dkd"], rel=1e-5)


@pytest.mark.parametrize("warmup", [{"dkd_warmup_steps": 4}, {"dkd_warmup_steps": 0.5}, {"dkd_warmup_epochs": 2.0}])
def test_the_weight_of_the_distillation_term_warms_up(tmp_path, warmup):
    student, teacher = vits()
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 8}
    logs = logs_of(trained(tmp_path, student, images(8), teacher, **settings, **warmup))
    assert [log["dkd_weight"] for log in logs] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    for log in logs:
        assert log["dkd"] == pytest.approx(log["dkd_weight"] * (log["tckd"] + log["nckd"]), rel=1e-5)
        assert log["loss"] == pytest.approx(log["ce"] + log["dkd"], abs=1e-5)
