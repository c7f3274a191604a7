"""`DKDTrainer` in evaluation: the student's own loss and predictions, and the teacher beside it where asked."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    T5ForConditionalGeneration,
    Trainer,
    ViTForImageClassification,
)

from hf_dkd import DKDSeq2SeqTrainer, DKDSeq2SeqTrainingArguments, DKDTrainer

from .trainer_helpers import (
    arguments,
    expected_logs,
    forwards,
    images,
    labelled_logits,
    logs_of,
    sentences,
    tagged,
    tiny,
    weights_of,
)

HEADS = [
    (ViTForImageClassification, images(10)),
    (BertForSequenceClassification, sentences(10)),
    (BertForTokenClassification, tagged([6, 1, 3, 5, 2, 0, 4, 6, 1, 3])),
]


def evaluator(path: Any, model: type[PreTrainedModel] = ViTForImageClassification, **settings: Any) -> DKDTrainer:
    """A trainer with a student and a teacher of one class that has not been trained."""
    keywords = {name: settings.pop(name, None) for name in ("compute_metrics", "preprocess_logits_for_metrics")}
    return DKDTrainer(tiny(model, 0), arguments(path, **settings), teacher=tiny(model, 1), **keywords)


def expected_metrics(trainer: DKDTrainer, examples: list[dict[str, Any]], prefix: str = "eval") -> dict[str, float]:
    """What the teacher's columns of an evaluation should be, from the logits of one batch of all `examples`."""
    student, teacher = trainer.model, trainer.teacher.model
    terms = expected_logs(student.eval(), teacher, examples, temperature=trainer.dkd_args.dkd_temperature)
    with torch.no_grad():
        logits, labels = labelled_logits(teacher, examples)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {f"{prefix}_{name}": terms[name] for name in ("tckd", "nckd", "teacher_agreement")} | {
        f"{prefix}_teacher_accuracy": accuracy
    }


# ---- The student's own ----


@pytest.mark.parametrize(("model", "examples"), HEADS)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.2}, {"gradient_accumulation_steps": 4}])
def test_loss_and_predictions_are_those_of_trainer(tmp_path, model, examples, settings):
    plain = Trainer(tiny(model, 0), arguments(tmp_path, **settings)).predict(examples)
    ours = evaluator(tmp_path, model, eval_with_teacher=True, **settings).predict(examples)
    assert ours.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-6)
    assert np.array_equal(ours.predictions, plain.predictions)
    assert np.array_equal(ours.label_ids, plain.label_ids)


def test_the_loss_of_an_own_function_is_that_of_trainer(tmp_path):
    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    args = arguments(tmp_path, gradient_accumulation_steps=4)
    models = [tiny(ViTForImageClassification, seed) for seed in (0, 0, 1)]
    plain = Trainer(models[0], args, compute_loss_func=own).evaluate(images(8))
    ours = DKDTrainer(models[1], args, compute_loss_func=own, teacher=models[2]).evaluate(images(8))
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


# ---- With the teacher ----


@pytest.mark.parametrize(("model", "examples"), HEADS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_teachers_metrics_are_means_over_all_labelled_rows(tmp_path, model, examples, temperature):
    trainer = evaluator(tmp_path, model, eval_with_teacher=True, dkd_temperature=temperature)
    metrics = trainer.evaluate(examples)
    expected = expected_metrics(trainer, examples)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_each_of_several_evaluation_sets_has_its_own_metrics(tmp_path):
    trainer = evaluator(tmp_path, eval_with_teacher=True)
    sets = {"a": images(6, seed=1), "b": images(5, seed=2)}
    metrics = trainer.evaluate(sets)
    expected = {k: v for name, e in sets.items() for k, v in expected_metrics(trainer, e, f"eval_{name}").items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_prediction_needs_no_labels(tmp_path):
    examples = [{"pixel_values": example["pixel_values"]} for example in images(6)]
    trainer = evaluator(tmp_path, eval_with_teacher=True)
    output = trainer.predict(examples)
    with torch.no_grad():
        expected = trainer.model(torch.stack([example["pixel_values"] for example in examples])).logits
    assert output.predictions == pytest.approx(expected.numpy(), rel=1e-5)
    assert output.label_ids is None
    assert not any("tckd" in name or "loss" in name for name in output.metrics)


def test_the_teacher_reads_its_own_columns(tmp_path):
    student, teacher = tiny(DistilBertForSequenceClassification), tiny(BertForSequenceClassification)
    examples = [{**example, "token_type_ids": torch.ones(6, dtype=torch.long)} for example in sentences(4)]
    of_student, of_teacher = forwards(student), forwards(teacher)
    DKDTrainer(student, arguments(tmp_path, eval_with_teacher=True), teacher=teacher).evaluate(examples)
    assert "token_type_ids" not in of_student[0]
    assert of_teacher[0]["token_type_ids"].eq(1).all()


# ---- Metrics of the script ----


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_teacher_logits_reach_compute_metrics_only_when_asked(tmp_path, asked, concat):
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"count": 1.0}

    include = ["teacher_logits", "inputs", "loss"] if asked else ["inputs", "loss"]
    trainer = evaluator(
        tmp_path, compute_metrics=compute_metrics, include_for_metrics=include, eval_do_concat_batches=concat
    )
    output = trainer.predict(images(10))
    plain = Trainer(trainer.model, arguments(tmp_path, eval_do_concat_batches=concat)).predict(images(10))

    def joined(batches: Any) -> np.ndarray:
        assert isinstance(batches, np.ndarray if concat else list)
        return np.concatenate(batches) if isinstance(batches, list) else batches

    (prediction,) = seen
    assert np.array_equal(joined(prediction.predictions), joined(plain.predictions))
    assert np.array_equal(joined(output.predictions), joined(plain.predictions))
    assert output.metrics["test_count"] == 1
    assert len(joined(prediction.inputs)) == 10
    assert len(prediction.losses) > 0
    assert hasattr(prediction, "teacher_logits") is asked
    if asked:
        expected = labelled_logits(trainer.teacher.model, images(10))[0].detach().numpy()
        assert joined(prediction.teacher_logits) == pytest.approx(expected, rel=1e-5)


def test_logits_are_preprocessed_without_the_teachers(tmp_path):
    shapes: list[tuple[int, ...]] = []

    def argmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return logits.argmax(-1)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return {"agreement": float((prediction.predictions == prediction.teacher_logits.argmax(-1)).mean())}

    trainer = evaluator(
        tmp_path,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=argmax,
        include_for_metrics=["teacher_logits"],
        eval_with_teacher=True,
    )
    metrics = trainer.evaluate(images(10))
    assert shapes == [(4, 4), (4, 4), (2, 4)]
    assert metrics["eval_agreement"] == pytest.approx(metrics["eval_teacher_agreement"])
    assert trainer.preprocess_logits_for_metrics is argmax
    assert trainer.compute_metrics is compute_metrics


def test_metrics_by_batch_get_the_teachers_logits_of_their_batch(tmp_path):
    counts: list[tuple[int, int, bool]] = []

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        counts.append((len(prediction.predictions), len(prediction.teacher_logits), compute_result))
        return {"rows": float(sum(rows for rows, _, _ in counts))} if compute_result else {}

    settings: dict[str, Any] = {"batch_eval_metrics": True, "include_for_metrics": ["teacher_logits"]}
    metrics = evaluator(tmp_path, compute_metrics=compute_metrics, **settings).evaluate(images(10))
    assert counts == [(4, 4, False), (4, 4, False), (2, 2, True)]
    assert metrics["eval_rows"] == 10


# ---- While training ----


@pytest.mark.parametrize(("model", "examples"), HEADS[:2])
def test_the_best_model_by_a_metric_of_the_teacher_is_loaded_at_the_end(tmp_path, model, examples):
    args = arguments(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        learning_rate=0.3, metric_for_best_model="tckd", greater_is_better=False, load_best_model_at_end=True,
        eval_with_teacher=True,
    )  # fmt: skip
    trainer = DKDTrainer(
        tiny(model, 0), args, train_dataset=examples[:8], eval_dataset=examples[4:], teacher=tiny(model, 1)
    )
    trainer.train()
    history = [log["eval_tckd"] for log in trainer.state.log_history if "eval_tckd" in log]
    best = 1 + int(np.argmin(history))
    assert len(history) == 6
    assert best < 6, "choose a learning rate that overshoots"
    assert trainer.state.best_metric == min(history)
    saved = model.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert torch.equal(weights_of(trainer.model), weights_of(saved))
    assert trainer.evaluate()["eval_tckd"] == pytest.approx(min(history), rel=1e-6)


def test_training_stops_early_when_the_teachers_metric_stalls(tmp_path):
    args = arguments(
        tmp_path, max_steps=10, learning_rate=0.0, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_nckd", greater_is_better=False,
        eval_with_teacher=True,
    )  # fmt: skip
    models = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
    trainer = DKDTrainer(
        models[0], args, train_dataset=images(8), eval_dataset=images(8), teacher=models[1],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3


def test_evaluation_leaves_the_logs_of_training_alone(tmp_path):
    def logs(**settings: Any) -> list[dict[str, float]]:
        models = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
        args = arguments(tmp_path, max_steps=4, logging_steps=2, **settings)
        trainer = DKDTrainer(models[0], args, train_dataset=images(8), eval_dataset=images(8), teacher=models[1])
        trainer.train()
        return logs_of(trainer)

    assert logs(eval_strategy="steps", eval_steps=1, eval_with_teacher=True) == logs()


# ---- Sequence to sequence ----


def pairs(count: int) -> list[dict[str, torch.Tensor]]:
    """Sentences with the same tokens as their targets, of different lengths."""
    examples = tagged([6, 2, 4, 1, 5, 3][:count])
    return [{**example, "labels": example["input_ids"].where(example["labels"] >= 0, -100)} for example in examples]


def test_a_sequence_to_sequence_model_is_distilled_and_generates(tmp_path):
    student, teacher = tiny(T5ForConditionalGeneration, 0), tiny(T5ForConditionalGeneration, 1)
    expected = expected_logs(student, teacher, pairs(6), alpha=0.5, beta=2.0, temperature=2.0)
    args = arguments(
        tmp_path, DKDSeq2SeqTrainingArguments, per_device_train_batch_size=6, learning_rate=0.0, dkd_alpha=0.5,
        dkd_beta=2.0, dkd_temperature=2.0, predict_with_generate=True, generation_max_length=5, eval_with_teacher=True,
    )  # fmt: skip
    seen: list[np.ndarray] = []
    trainer = DKDSeq2SeqTrainer(
        student, args, train_dataset=pairs(6), eval_dataset=pairs(6), teacher=teacher,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )  # fmt: skip
    trainer.train()
    (log,) = logs_of(trainer)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-5)

    metrics = trainer.evaluate()
    assert {name: metrics[f"eval_{name}"] for name in ("tckd", "nckd", "teacher_agreement")} == pytest.approx(
        {name: expected[name] for name in ("tckd", "nckd", "teacher_agreement")}, rel=1e-5
    )
    inputs = torch.stack([example["input_ids"] for example in pairs(6)])
    generated = student.generate(inputs, max_length=5)
    assert torch.equal(torch.tensor(seen[0][:, : generated.shape[1]]), generated)
