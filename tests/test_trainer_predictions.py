"""`DKDTrainer` in evaluation, on every architecture and from within the metrics of a script."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, T5ForConditionalGeneration, Trainer, ViTForImageClassification

from hf_dkd import DKDSeq2SeqTrainer, DKDSeq2SeqTrainingArguments, DKDTrainer

from .models import ARCHITECTURES
from .trainer_helpers import arguments, expected_logs, forwards, images, in_rows, labelled_logits, tiny, vits

TERMS = ("eval_tckd", "eval_nckd", "eval_teacher_agreement", "eval_teacher_accuracy")


# ---- The loss ----


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.2}])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_trainers_on_every_architecture(tmp_path, name, settings):
    architecture, batch = ARCHITECTURES[name], ARCHITECTURES[name].batch()
    if name in ("t5", "bart"):
        # As DataCollatorForSeq2Seq: Trainer takes the labels away where it smooths them.
        batch["decoder_input_ids"] = architecture.model().prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    examples = in_rows(batch)
    # Eight examples in threes, so that the last batch is smaller.
    args = arguments(tmp_path, per_device_eval_batch_size=3, eval_with_teacher=True, **settings)
    plain = Trainer(architecture.model(0), args).evaluate(examples)["eval_loss"]
    alone = DKDTrainer(architecture.model(0), args).evaluate(examples)
    taught = DKDTrainer(architecture.model(0), args, teacher=architecture.model(1)).evaluate(examples)
    assert alone["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert taught["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert "eval_tckd" not in alone
    assert taught["eval_tckd"] > 0


# ---- The teacher's logits ----


def test_the_teachers_logits_stand_in_the_students_order(tmp_path):
    order, names = torch.tensor([2, 0, 3, 1]), ["cat", "dog", "emu", "fox"]
    student = tiny(ViTForImageClassification, 0, id2label=dict(enumerate(names)))
    teacher = tiny(ViTForImageClassification, 0, id2label={i: names[k] for i, k in enumerate(order.tolist())})
    for parameter in teacher.classifier.parameters():
        parameter.data = parameter.data[order]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.predictions == pytest.approx(prediction.teacher_logits, abs=1e-5)
        agreement = prediction.predictions.argmax(1) == prediction.teacher_logits.argmax(1)
        return {"agreement": float(agreement.mean())}

    args = arguments(tmp_path, include_for_metrics=["teacher_logits"], eval_with_teacher=True)
    metrics = DKDTrainer(student, args, teacher=teacher, compute_metrics=compute_metrics).evaluate(images(10))
    assert metrics["eval_agreement"] == metrics["eval_teacher_agreement"] == 1
    assert metrics["eval_tckd"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_teachers_answers_are_start_and_end_logits_as_the_students(tmp_path, return_dict):
    seen: list[EvalPrediction] = []
    student, teacher = ARCHITECTURES["bert_qa"].model(0), ARCHITECTURES["bert_qa"].model(1)
    student.config.return_dict = teacher.config.return_dict = return_dict
    batch = ARCHITECTURES["bert_qa"].batch()
    args = arguments(tmp_path, include_for_metrics=["teacher_logits"], per_device_eval_batch_size=3)
    trainer = DKDTrainer(student, args, teacher=teacher, compute_metrics=lambda p: seen.append(p) or {})
    output = trainer.predict(in_rows(batch))
    (prediction,) = seen
    teacher.config.return_dict = True
    with torch.no_grad():
        expected = teacher(**batch)
    assert isinstance(prediction.teacher_logits, tuple)
    for logits, of_teacher, name in zip(
        prediction.predictions, prediction.teacher_logits, ("start_logits", "end_logits"), strict=True
    ):
        assert of_teacher.shape == logits.shape == (8, 12)
        assert of_teacher == pytest.approx(expected[name].numpy(), abs=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(output.predictions, prediction.predictions, strict=True))


# ---- Called by hand, and from within ----


@pytest.mark.parametrize("name", ["vit", "bert_qa", "llama"])
@pytest.mark.parametrize("loss_only", [True, False])
def test_a_step_may_be_called_by_hand(tmp_path, name, loss_only):
    architecture, batch = ARCHITECTURES[name], ARCHITECTURES[name].batch()
    args = arguments(tmp_path, eval_with_teacher=True)
    student = architecture.model(0).eval()
    trainer = DKDTrainer(student, args, teacher=architecture.model(1))
    loss, logits, labels = trainer.prediction_step(student, batch, prediction_loss_only=loss_only)
    plain = Trainer(student, args).prediction_step(student, batch, prediction_loss_only=loss_only)
    assert loss.item() == pytest.approx(plain[0].item(), rel=1e-5)
    if loss_only:
        assert logits is labels is None
    elif name == "vit":
        assert torch.equal(logits, plain[1])
        assert torch.equal(labels, batch["labels"])
    # What a step by hand left behind is in no evaluation.
    examples = in_rows(batch)[:4]
    fresh = DKDTrainer(student, args, teacher=architecture.model(1)).evaluate(examples)
    metrics = trainer.evaluate(examples)
    assert [metrics[term] for term in TERMS] == [fresh[term] for term in TERMS]


@pytest.mark.parametrize("wants_logits", [False, True])
def test_metrics_that_predict_leave_the_evaluation_around_them_alone(tmp_path, wants_logits):
    inner: list[Any] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.predictions.shape == ((3, 4) if inner else (10, 4))
        assert hasattr(prediction, "teacher_logits") is wants_logits
        if not inner:
            inner.append(None)
            inner[0] = trainer.predict(images(3, seed=1))
        return {"rows": float(len(prediction.predictions))}

    student, teacher = vits()
    include = ["teacher_logits"] if wants_logits else []
    args = arguments(tmp_path, eval_with_teacher=True, include_for_metrics=include)
    trainer = DKDTrainer(student, args, teacher=teacher, compute_metrics=compute_metrics)
    metrics = trainer.evaluate(images(10))

    expected = expected_logs(student, teacher, images(10))
    for name in ("tckd", "nckd", "teacher_agreement"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5)
    assert metrics["eval_rows"] == 10
    expected = expected_logs(student, teacher, images(3, seed=1))
    assert inner[0].metrics["test_tckd"] == pytest.approx(expected["tckd"], rel=1e-5)
    assert inner[0].predictions == pytest.approx(
        labelled_logits(student, images(3, seed=1))[0].detach().numpy(), rel=1e-5
    )


@pytest.mark.parametrize("name", ["dkd_temperature", "dkd_alpha"])
def test_a_setting_out_of_range_is_refused_before_evaluating(tmp_path, name):
    student, teacher = vits()
    trainer = DKDTrainer(student, arguments(tmp_path, eval_with_teacher=True), teacher=teacher)
    value = {"dkd_temperature": 0, "dkd_alpha": -1}[name]
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=rf"{name} is {float(value)}; expected"):
        trainer.evaluate(images(4))


def test_the_teacher_does_not_run_where_no_metric_reads_its_logits(tmp_path):
    unlabelled = [{"pixel_values": example["pixel_values"]} for example in images(6)]
    student, teacher = vits()
    seen = []
    args = arguments(tmp_path, include_for_metrics=["teacher_logits"])
    trainer = DKDTrainer(student, args, teacher=teacher, compute_metrics=lambda p: seen.append(p.teacher_logits) or {})
    calls = forwards(teacher)
    assert trainer.predict(unlabelled).predictions.shape == (6, 4)
    assert calls == seen == []
    trainer.predict(images(6))
    assert len(seen) == 1
    trainer.compute_metrics = None
    del calls[:]
    assert trainer.predict(images(6)).predictions.shape == (6, 4)
    assert calls == []


def test_texts_without_labels_are_generated_whatever_the_metrics_want(tmp_path):
    sources = [{"input_ids": torch.arange(2, 8) + row, "attention_mask": torch.ones(6).long()} for row in range(4)]
    args = arguments(
        tmp_path, DKDSeq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=5,
        include_for_metrics=["teacher_logits"],
    )  # fmt: skip
    models = [tiny(T5ForConditionalGeneration, seed) for seed in (0, 1)]
    trainer = DKDSeq2SeqTrainer(models[0], args, teacher=models[1], compute_metrics=lambda prediction: {})
    assert trainer.predict(sources).predictions.shape[0] == 4
