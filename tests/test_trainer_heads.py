"""`DKDTrainer` on heads of every kind: whose classes, which positions, which labels."""

import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
    ViTForImageClassification,
)

from hf_dkd import DKDTrainer

from .models import ARCHITECTURES
from .trainer_helpers import (
    arguments,
    assert_close,
    expected_terms,
    first_gradient,
    forwards,
    images,
    in_rows,
    labelled_logits,
    logs_of,
    sentences,
    tagged,
    tiny,
    trained,
)

TERMS = ("loss", "ce", "tckd", "nckd", "dkd", "teacher_agreement")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("hf_dkd")]


# ---- Classes ----


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_class_names_read_from_json_are_those_with_numbers_as_keys(tmp_path, caplog, whose):
    names = {index: f"kind {index}" for index in range(12)}

    def run(with_strings: bool) -> dict[str, float]:
        models = {
            role: tiny(ViTForImageClassification, seed, num_labels=12, id2label=names)
            for seed, role in enumerate(roles)
        }
        if with_strings:
            models[whose].config.id2label = {str(index): name for index, name in names.items()}
        return logs_of(trained(tmp_path, models["student"], images(4, classes=12), models["teacher"]))[0]

    roles = ("student", "teacher")
    with caplog.at_level(logging.WARNING, logger="hf_dkd"):
        assert run(True)["dkd"] == run(False)["dkd"]
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("classes", "settings", "warnings"),
    [(2, {}, 1), (2, {"distillation": "kd"}, 0), (2, {"dkd_beta": 0.0}, 0), (3, {}, 0)],
)
def test_two_classes_are_told_once_that_nckd_is_zero(tmp_path, caplog, classes, settings, warnings):
    student, teacher = (tiny(BertForSequenceClassification, seed, num_labels=classes) for seed in (0, 1))
    with caplog.at_level(logging.WARNING, logger="hf_dkd"):
        trainer = trained(tmp_path, student, sentences(8, classes=classes), teacher, max_steps=2, **settings)
        trainer.train()
    assert len([line for line in said(caplog) if "NCKD is 0" in line]) == warnings
    assert all((log["nckd"] == 0) is (classes == 2) for log in logs_of(trainer))


# ---- Labels ----


@pytest.mark.parametrize("wrong", [7, -1])
def test_a_label_outside_the_classes_is_named_before_the_students_loss_fails(tmp_path, wrong):
    student, teacher = (tiny(BertForSequenceClassification, seed, num_labels=5) for seed in (0, 1))
    examples = sentences(4)
    examples[2]["labels"] = wrong
    with pytest.raises(ValueError, match=rf"label {wrong} is outside \[0, 5\)"):
        trained(tmp_path, student, examples, teacher)


def test_a_regression_head_is_refused_at_construction(tmp_path):
    student, teacher = (tiny(BertForSequenceClassification, seed, num_labels=1) for seed in (0, 1))
    with pytest.raises(ValueError, match="num_labels=1, a regression head"):
        DKDTrainer(student, arguments(tmp_path), teacher=teacher)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.rand(4), r"labels are torch\.float32 of shape \(4,\).*takes one class index"),
        (torch.ones(4, 6), r"labels have shape \(4, 6\) for logits of shape \(4, 5\)"),
    ],
)
@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, message, problem):
    several = {"num_labels": 5, "problem_type": problem}
    student, teacher = (tiny(BertForSequenceClassification, seed, **several) for seed in (0, 1))
    examples = [{**example, "labels": label} for example, label in zip(sentences(4), labels, strict=True)]
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, student, examples, teacher)


def test_a_regression_of_several_values_is_refused(tmp_path):
    config = {"num_labels": 3, "problem_type": "regression"}
    student, teacher = (tiny(BertForSequenceClassification, seed, **config) for seed in (0, 1))
    with pytest.raises(ValueError, match='problem_type is "regression"'):
        DKDTrainer(student, arguments(tmp_path), teacher=teacher)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shifted_labels_of_a_collator_count_as_its_labels_do(tmp_path, name):
    architecture = ARCHITECTURES[name]
    batch = architecture.batch()
    shifted = batch["labels"].roll(-1, 1)
    shifted[:, -1] = -100
    # Other labels than those that shifting gives, and two micro-batches of very different length.
    shifted[:2, 2:], shifted[2:4] = -100, shifted[2:4].roll(1, 0)
    examples = in_rows(batch | {"shift_labels": shifted})

    def run(size: int, steps: int) -> tuple[Tensor, dict[str, float]]:
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path, remove_unused_columns=False, dkd_beta=2.0, **split)
        student, teacher = architecture.model(0), architecture.model(1)
        trainer = DKDTrainer(student, args, train_dataset=examples, teacher=teacher)
        return first_gradient(trainer), logs_of(trainer)[0]

    (whole, log), (parts, log_of_parts) = run(8, 1), run(2, 4)
    assert_close(parts, whole)
    assert log_of_parts == pytest.approx(log, rel=1e-5)
    inputs = {column: batch[column] for column in ("input_ids", "attention_mask")}
    kept = shifted != -100
    with torch.no_grad():
        rows = [architecture.model(seed)(**inputs).logits[kept].double() for seed in (0, 1)]
    expected = expected_terms(*rows, shifted[kept], beta=2.0)
    assert {term: log[term] for term in TERMS} == pytest.approx(expected, rel=1e-5)


# ---- Question answering ----


def answers() -> list[dict[str, Tensor]]:
    return in_rows(ARCHITECTURES["bert_qa"].batch())


def answer_models() -> tuple[BertForQuestionAnswering, BertForQuestionAnswering]:
    return ARCHITECTURES["bert_qa"].model(0), ARCHITECTURES["bert_qa"].model(1)


def test_padding_is_no_class_of_an_answer(tmp_path):
    student, teacher = answer_models()
    batch = ARCHITECTURES["bert_qa"].batch()
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()
    terms = []
    for example, length in zip(answers(), lengths, strict=True):
        inputs = {name: example[name][None] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            both = [model(**inputs) for model in (student, teacher)]
        for which in ("start", "end"):
            rows = [output[f"{which}_logits"][:, :length].double() for output in both]
            terms.append(expected_terms(*rows, example[f"{which}_positions"][None], beta=2.0, temperature=2.0))
    settings = {"dkd_beta": 2.0, "dkd_temperature": 2.0, "per_device_train_batch_size": 8}
    (log,) = logs_of(trained(tmp_path, student, answers(), teacher, **settings))
    for name in ("tckd", "nckd", "dkd", "teacher_agreement"):
        assert log[name] == pytest.approx(sum(term[name] for term in terms) / 16, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_answers_in_tuples_train_as_those_in_dictionaries(tmp_path, steps):
    def run(return_dict: bool) -> tuple[Tensor, dict[str, float], dict[str, float]]:
        student, teacher = answer_models()
        for model in (student, teacher):
            model.config.return_dict = return_dict
            assert isinstance(model(**ARCHITECTURES["bert_qa"].batch()), tuple) is not return_dict
        split = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path, eval_with_teacher=True, **split)
        trainer = DKDTrainer(student, args, train_dataset=answers(), teacher=teacher)
        metrics = trainer.evaluate(answers())
        metrics = {name: metrics[f"eval_{name}"] for name in ("loss", "tckd", "nckd", "teacher_accuracy")}
        return first_gradient(trainer), logs_of(trainer)[0], metrics

    (gradient, log, metrics), (expected, expected_log, expected_metrics) = run(False), run(True)
    assert torch.equal(gradient, expected)
    assert log == expected_log
    assert metrics == expected_metrics
    assert log["loss"] == pytest.approx(log["ce"] + log["dkd"], rel=1e-5)


# ---- Tokens ----


def test_a_teacher_tags_its_own_ids_at_the_same_positions(tmp_path):
    student, teacher = tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1)
    examples, others = tagged([6, 1, 3, 5]), tagged([6, 1, 3, 5], seed=1)
    own = [{**e, "teacher_input_ids": o["input_ids"]} for e, o in zip(examples, others, strict=True)]
    with torch.no_grad():
        logits, labels = labelled_logits(student, examples)
        ids, at = torch.stack([other["input_ids"] for other in others]), torch.stack([e["labels"] for e in examples])
        expected = expected_terms(logits, teacher(ids).logits[at != -100].double(), labels)
    of_teacher = forwards(teacher)
    (log,) = logs_of(trained(tmp_path, student, own, teacher))
    assert torch.equal(of_teacher[0]["input_ids"], ids)
    assert {term: log[term] for term in TERMS} == pytest.approx(expected, rel=1e-5)


def test_a_teacher_whose_tokens_stand_elsewhere_is_refused_by_both_lengths(tmp_path):
    student, teacher = tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1)
    longer = {"teacher_input_ids": torch.ones(9, dtype=torch.long), "teacher_attention_mask": torch.ones(9)}
    message = r"teacher's logits have shape \(4, 9, 4\) for labels of shape \(4, 6\).*must see the same positions"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, student, [{**example, **longer} for example in tagged([6, 1, 3, 5])], teacher)


class Searches(TorchDispatchMode):
    """Counts the operations whose result has a shape that the device must tell."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("model", "examples", "searches"),
    [
        (BertForTokenClassification, tagged([6, 1, 0, 3]), 0),
        (BertForSequenceClassification, sentences(4), 0),
        # The fused loss leaves unlabelled rows out of its products.
        (GPT2LMHeadModel, tagged([6, 1, 0, 3]), 1),
    ],
)
def test_the_positions_of_labels_are_searched_once_a_micro_batch_at_most(tmp_path, model, examples, searches):
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = DKDTrainer(tiny(model, 0), args, train_dataset=examples, teacher=tiny(model, 1))
    with Searches() as mode:
        trainer.train()
    assert mode.count == 2 * searches


@pytest.mark.parametrize("classes", [3, 5])
def test_a_teacher_of_another_number_of_classes_is_refused_at_construction(tmp_path, classes):
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1, num_labels=classes)
    with pytest.raises(ValueError, match=f"The student has 4 classes and the teacher {classes}"):
        DKDTrainer(student, arguments(tmp_path), teacher=teacher)
