"""The trainer's other divisions of the classes: logged under their names, the oracle's gradient, refused where void."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertForTokenClassification,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    default_data_collator,
)

from hf_dkd import DKDSeq2SeqTrainer, DKDSeq2SeqTrainingArguments, DKDTrainer

from . import oracle
from .trainer_helpers import (
    all_logits,
    arguments,
    assert_close,
    first_gradient,
    images,
    labelled_logits,
    logs_of,
    sentences,
    tagged,
    tiny,
    trained,
    without_labels,
)

HEADS = [
    pytest.param(ViTForImageClassification, images(4, classes=6), id="vit"),
    pytest.param(BertForTokenClassification, tagged([6, 0, 2, 3], classes=6), id="bert_tokens"),
]
SETTINGS: dict[str, float] = {"dkd_alpha": 0.5, "dkd_beta": 4.0, "dkd_temperature": 2.0, "ce_weight": 0.25}


def by_rank(teacher: Tensor) -> Tensor:
    return torch.tensor([0, 1, 1, 2, 2, 2])[teacher.argsort(1, descending=True).argsort(1)]


def by_ranking(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of rows with the teacher's first class, its next two, and the other three as groups."""
    between, within, _ = oracle.grouped(student, teacher, by_rank(teacher), 3, 2.0)
    return 4 * (0.5 * between + 3 * within[:, 1] + 4 * within[:, 2])


def standardised(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = ((one - one.mean(1, keepdim=True)) / one.std(1, keepdim=True) for one in (student, teacher))
    return oracle.dkd(student, teacher, labels, 0.5, 4.0, 2.0)


OPTIONS: list[Any] = [
    pytest.param({"dkd_top_k": 3, "dkd_top_k_beta": 3.0}, lambda s, t, y: by_ranking(s, t), id="top k"),
    pytest.param({"dkd_standardize": True}, standardised, id="standardised"),
]


@pytest.mark.parametrize(("options", "by_hand"), OPTIONS)
@pytest.mark.parametrize(("model", "examples"), HEADS)
@pytest.mark.parametrize("split", [(4, 1), (1, 4)], ids=["4", "1 × 4"])
def test_the_step_is_the_oracles_however_it_is_split(
    tmp_path: Path, model: Any, examples: Any, options: dict, by_hand: Any, split: tuple[int, int]
) -> None:
    student, teacher = tiny(model, 0, num_labels=6), tiny(model, 1, num_labels=6)
    logits, labels = labelled_logits(student, examples)
    rows = by_hand(logits, labelled_logits(teacher, examples)[0], labels)
    loss = 0.25 * cross_entropy(logits, labels) + rows.mean()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    student.zero_grad()

    sizes = {"per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]}
    args = arguments(tmp_path, **SETTINGS, **options, **sizes)
    trainer = DKDTrainer(student, args, train_dataset=examples, teacher=teacher)
    assert_close(first_gradient(trainer), expected)
    (entry,) = logs_of(trainer)
    assert (entry["loss"], entry["dkd"]) == pytest.approx((loss.item(), rows.mean().item()), rel=1e-5)
    assert ("top_k" in entry) == ("dkd_top_k" in options)


def test_evaluation_reports_the_top_k(tmp_path: Path) -> None:
    student, teacher = (tiny(ViTForImageClassification, seed, num_labels=6) for seed in (0, 1))
    settings = {"dkd_top_k": 3, "eval_with_teacher": True}
    trainer = trained(tmp_path, student, images(4, classes=6), teacher, **settings)
    examples = images(6, classes=6)
    found = trainer.evaluate(examples)
    logits = labelled_logits(teacher, examples)[0]
    between, within, _ = oracle.grouped(labelled_logits(student, examples)[0], logits, by_rank(logits), 3)
    expected = {"eval_tckd": between.mean(), "eval_top_k": within[:, 1].mean(), "eval_nckd": within[:, 2].mean()}
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (2, {"dkd_standardize": True}, "dkd_standardize is set for two classes"),
        (4, {"dkd_top_k": 4}, "dkd_top_k is 4 for 4 classes; expected less"),
        (2, {"dkd_alpha": 0.0, "ce_weight": 0.0}, "Two classes: NCKD is 0, and dkd_alpha and ce_weight are 0 too"),
    ],
)
def test_a_division_that_is_none_is_refused(tmp_path: Path, classes: int, options: dict, message: str) -> None:
    student, teacher = (tiny(ViTForImageClassification, seed, num_labels=classes) for seed in (0, 1))
    with pytest.raises(ValueError, match=message):
        DKDTrainer(student, arguments(tmp_path, **options), teacher=teacher)


# ---- Rows without a label ----


def partly_labelled(model: Any) -> list[dict[str, Any]]:
    """Four examples of which one has no label at all, and the tagger's others have some."""
    if model is BertForTokenClassification:
        return tagged([6, 0, 2, 3])
    return [example | {"labels": -100 if index == 1 else example["labels"]} for index, example in enumerate(images(4))]


@pytest.mark.parametrize("labelled", [True, False], ids=["some labels", "no labels"])
@pytest.mark.parametrize("model", [ViTForImageClassification, BertForTokenClassification])
@pytest.mark.parametrize("split", [(4, 1), (1, 4), (3, 2)], ids=["4", "1 × 4", "3 + 1"])
def test_the_teacher_is_the_target_of_rows_without_a_label(
    tmp_path: Path, model: Any, labelled: bool, split: tuple[int, int]
) -> None:
    student, teacher = tiny(model, 0), tiny(model, 1)
    examples = partly_labelled(model)
    labels = default_data_collator(examples)["labels"].flatten()
    labels = labels if labelled else torch.full_like(labels, -100)
    logits, teacher_logits = all_logits(student, examples), all_logits(teacher, examples)
    rows = oracle.dkd(logits, teacher_logits, torch.where(labels == -100, teacher_logits.argmax(1), labels), 0.5, 4, 2)
    hard = cross_entropy(logits, labels, ignore_index=-100) if labelled else torch.zeros(())
    (0.25 * hard + rows.mean()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    student.zero_grad()

    sizes = {"per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]}
    args = arguments(tmp_path, **SETTINGS, dkd_target="teacher", **sizes)
    data = examples if labelled else without_labels(examples)
    trainer = DKDTrainer(student, args, train_dataset=data, teacher=teacher)
    assert_close(first_gradient(trainer), expected)
    (entry,) = logs_of(trainer)
    assert (entry["ce"], entry["dkd"]) == pytest.approx((hard.item(), rows.mean().item()), rel=1e-5)
    assert entry["teacher_targets"] == pytest.approx((labels == -100).double().mean().item())


def test_labels_are_not_overruled_by_the_teacher(tmp_path: Path) -> None:
    entries = []
    for target in ("label", "teacher"):
        student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
        (entry,) = logs_of(trained(tmp_path, student, images(4), teacher, dkd_target=target))
        entries.append(entry)
    assert entries[1].pop("teacher_targets") == 0
    assert entries[0] == entries[1]


def test_a_causal_model_learns_from_raw_text(tmp_path: Path) -> None:
    student, teacher = tiny(GPT2LMHeadModel, 0), tiny(GPT2LMHeadModel, 1)
    texts = without_labels(sentences(4))
    texts[1]["attention_mask"][4:] = 0
    with torch.no_grad():
        batch = default_data_collator(texts)
        kept = batch["attention_mask"].bool()
        logits, teacher_logits = (one(**batch).logits.double()[kept] for one in (student, teacher))
    expected = oracle.dkd(logits, teacher_logits, teacher_logits.argmax(1)).mean()
    (entry,) = logs_of(trained(tmp_path, student, texts, teacher, dkd_target="teacher"))
    assert entry["dkd"] == pytest.approx(expected.item(), rel=1e-5)
    assert (entry["ce"], entry["teacher_targets"]) == (0, 1)


@pytest.mark.parametrize("labelled", [True, False])
def test_evaluation_is_over_the_same_rows_and_the_teachers_accuracy_over_the_labelled(
    tmp_path: Path, labelled: bool
) -> None:
    student, teacher = tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1)
    examples = tagged([6, 0, 2, 3])
    labels = default_data_collator(examples)["labels"].flatten()
    args = arguments(tmp_path, dkd_target="teacher", eval_with_teacher=True)
    data = examples if labelled else without_labels(examples)
    found = DKDTrainer(student, args, teacher=teacher).evaluate(data)
    with torch.no_grad():
        logits, teacher_logits = all_logits(student, examples), all_logits(teacher, examples)
    chosen = teacher_logits.argmax(1)
    targets = torch.where(labels == -100, chosen, labels) if labelled else chosen
    tckd, nckd, _, _ = oracle.divergences(logits, teacher_logits, targets)
    assert (found["eval_tckd"], found["eval_nckd"]) == pytest.approx((tckd.mean().item(), nckd.mean().item()), rel=1e-5)
    hits = (chosen == labels)[labels != -100].double().mean().item()
    assert found.get("eval_teacher_accuracy") == (pytest.approx(hits) if labelled else None)


def test_the_teacher_is_not_right_by_its_own_labels(tmp_path: Path) -> None:
    student, teacher = (tiny(ViTForImageClassification, s, problem_type="multi_label_classification") for s in (0, 1))
    args = arguments(tmp_path, dkd_target="teacher", eval_with_teacher=True)
    found = DKDTrainer(student, args, teacher=teacher).evaluate(without_labels(images(4)))
    assert found["eval_tckd"] > 0
    assert "eval_teacher_accuracy" not in found


def test_an_encoder_decoder_predicts_without_labels(tmp_path: Path) -> None:
    student, teacher = tiny(T5ForConditionalGeneration, 0), tiny(T5ForConditionalGeneration, 1)
    settings = {"dkd_target": "teacher", "eval_with_teacher": True, "predict_with_generate": True}
    args = arguments(tmp_path, DKDSeq2SeqTrainingArguments, **settings)
    output = DKDSeq2SeqTrainer(student, args, teacher=teacher).predict(without_labels(sentences(4)))
    assert len(output.predictions) == 4


def test_a_step_that_is_computed_by_hand_needs_no_count_of_ours(tmp_path: Path) -> None:
    losses = []
    for target in ("label", "teacher"):
        student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
        trainer = DKDTrainer(student, arguments(tmp_path, dkd_target=target), teacher=teacher)
        batch = default_data_collator(images(4))
        losses.append(trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(4)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_tokens_that_no_mask_shows_are_told_to_be_left_out(tmp_path: Path, caplog: Any) -> None:
    student, teacher = tiny(GPT2LMHeadModel, 0), tiny(GPT2LMHeadModel, 1)
    texts = [{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in sentences(4)]
    (entry,) = logs_of(trained(tmp_path, student, texts, teacher, dkd_target="teacher"))
    assert entry["teacher_targets"] == 0
    assert caplog.text.count("without attention_mask only the labels tell text from padding") == 1


def test_labels_that_are_all_missing_report_nothing(tmp_path: Path) -> None:
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
    trainer = DKDTrainer(student, arguments(tmp_path, eval_with_teacher=True), teacher=teacher)
    found = trainer.evaluate([example | {"labels": -100} for example in images(4)])
    assert not {"eval_tckd", "eval_nckd", "eval_teacher_agreement", "eval_teacher_accuracy"} & found.keys()


@pytest.mark.parametrize("options", [{}, {"dkd_target": "teacher", "dkd_alpha": 0.0, "dkd_beta": 0.0}])
def test_data_without_labels_name_the_remedy(tmp_path: Path, options: dict) -> None:
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
    with pytest.raises(ValueError, match=r'no labels for a classification head.*With dkd_target="teacher"'):
        trained(tmp_path, student, without_labels(images(4)), teacher, **options)
