"""`DKDTrainer` with what scripts bring: columns, heads and vocabularies of the teacher's own, accumulation."""

import copy
import logging
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertForSequenceClassification,
    GPT2LMHeadModel,
    ViTForImageClassification,
)

from hf_dkd import DataCollatorWithTeacherInputs, DKDTrainer

from . import oracle
from .trainer_helpers import (
    arguments,
    assert_close,
    expected_logs,
    expected_terms,
    first_gradient,
    forwards,
    images,
    labelled_logits,
    logs_of,
    sentences,
    tagged,
    tiny,
    trained,
    weights_of,
)


def terms_in(log: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    """The entries of `log` that `expected` names."""
    return {name: log[name] for name in expected}


# ---- Columns ----


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_token_types_reach_the_teacher_and_not_the_student(tmp_path, remove_unused_columns):
    student, teacher = tiny(DistilBertForSequenceClassification, 0), tiny(BertForSequenceClassification, 1)
    types = torch.tensor([[0, 0, 1, 1, 0, 1]] * 4)
    with torch.no_grad():
        student_logits, labels = labelled_logits(student, sentences(4))
        teacher_logits, _ = labelled_logits(teacher, sentences(4), token_type_ids=types)
    columns = {"input_ids": [e["input_ids"].tolist() for e in sentences(4)], "attention_mask": [[1] * 6] * 4}
    columns |= {"token_type_ids": types.tolist(), "labels": labels.tolist()}
    if remove_unused_columns:
        columns["note"] = ["of no use"] * 4
    examples = datasets.Dataset.from_dict(columns)
    of_student, of_teacher = forwards(student), forwards(teacher)
    trainer = trained(tmp_path, student, examples, teacher, remove_unused_columns=remove_unused_columns)

    assert set(of_student[0]) == {"input_ids", "attention_mask", "labels"}
    assert set(of_teacher[0]) == {"input_ids", "attention_mask", "token_type_ids"}
    expected = expected_terms(student_logits, teacher_logits, labels)
    assert terms_in(logs_of(trainer)[0], expected) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_a_teacher_sees_images_of_its_own_size(tmp_path, remove_unused_columns):
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1, image_size=16)
    large = images(4, size=16, seed=2)
    examples = [{**e, "teacher_pixel_values": f["pixel_values"]} for e, f in zip(images(4), large, strict=True)]
    with torch.no_grad():
        student_logits, labels = labelled_logits(student, images(4))
        expected = expected_terms(student_logits, labelled_logits(teacher, large)[0], labels)
    of_student, of_teacher = forwards(student), forwards(teacher)
    trainer = trained(tmp_path, student, examples, teacher, remove_unused_columns=remove_unused_columns)

    assert (set(of_student[0]), set(of_teacher[0])) == ({"pixel_values", "labels"}, {"pixel_values"})
    assert (of_student[0]["pixel_values"].shape[-1], of_teacher[0]["pixel_values"].shape[-1]) == (8, 16)
    assert terms_in(logs_of(trainer)[0], expected) == pytest.approx(expected, rel=1e-5)


def padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad token ids of different lengths, as DataCollatorWithPadding does, and mask the padding."""
    ids = [torch.as_tensor(example["input_ids"]) for example in examples]
    batch = {"input_ids": pad_sequence(ids, batch_first=True)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    labels = [example["labels"] for example in examples if "labels" in example]
    return batch | ({"labels": torch.tensor(labels)} if labels else {})


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_two_tokenizers_bring_ids_of_two_lengths(tmp_path, remove_unused_columns):
    student, teacher = tiny(DistilBertForSequenceClassification, 0), tiny(BertForSequenceClassification, 1)
    short, long = sentences(4, length=4), sentences(4, length=9, seed=1)
    long[1]["input_ids"], short[2]["input_ids"] = long[1]["input_ids"][:5], short[2]["input_ids"][:3]
    examples = [
        {"input_ids": s["input_ids"].tolist(), "labels": s["labels"], "teacher_input_ids": t["input_ids"].tolist()}
        for s, t in zip(short, long, strict=True)
    ]
    batch, teacher_batch = padded(short), padded(long)
    with torch.no_grad():
        rows = student(**batch).logits.double(), teacher(**teacher_batch).logits.double()
    expected = expected_terms(*rows, batch["labels"])
    of_student, of_teacher = forwards(student), forwards(teacher)
    args = arguments(tmp_path, remove_unused_columns=remove_unused_columns)
    collator = DataCollatorWithTeacherInputs(padded, padded)
    trainer = DKDTrainer(student, args, collator, datasets.Dataset.from_list(examples), teacher=teacher)
    trainer.train()

    assert (of_student[0]["input_ids"].shape, of_teacher[0]["input_ids"].shape) == ((4, 4), (4, 9))
    assert torch.equal(of_teacher[0]["attention_mask"], teacher_batch["attention_mask"])
    assert not any(name.startswith("teacher_") for name in of_student[0])
    assert terms_in(logs_of(trainer)[0], expected) == pytest.approx(expected, rel=1e-5)


# ---- Heads and classes ----


class OwnModel(nn.Module):
    """A student that is no model of transformers."""

    main_input_name = "pixel_values"

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(64, 4)

    def forward(self, pixel_values, labels=None):
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}


def test_an_unknown_head_is_refused_unless_dkd_head_tells(tmp_path):
    with pytest.raises(ValueError, match=r"OwnModel.*Set dkd_head"):
        DKDTrainer(OwnModel(0), arguments(tmp_path), teacher=OwnModel(1))

    student, teacher = OwnModel(0), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    pixels, labels = torch.stack([e["pixel_values"] for e in images(4)]), torch.tensor([e["labels"] for e in images(4)])
    with torch.no_grad():
        expected = oracle.dkd(student(pixels)["logits"].double(), teacher(pixels).double(), labels).mean().item()
    trainer = trained(tmp_path, student, images(4), teacher, dkd_head="classification")
    assert logs_of(trainer)[0]["dkd"] == pytest.approx(expected, rel=1e-5)


def test_vocabularies_that_differ_in_padding_rows_share_a_prefix(tmp_path, caplog):
    student, teacher = tiny(GPT2LMHeadModel, 0, vocab_size=96), tiny(GPT2LMHeadModel, 1, vocab_size=100)
    examples = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in sentences(4)]
    ids = torch.stack([example["input_ids"] for example in examples])
    with torch.no_grad():
        logits, of_teacher = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1, :96]
    expected = expected_terms(logits.flatten(0, 1).double(), of_teacher.flatten(0, 1).double(), ids[:, 1:].flatten())
    with caplog.at_level(logging.WARNING, logger="hf_dkd"):
        trainer = trained(tmp_path, student, examples, teacher, max_steps=3)
    assert terms_in(logs_of(trainer)[0], expected) == pytest.approx(expected, rel=1e-5)
    (line,) = [record.message for record in caplog.records if record.name.startswith("hf_dkd")]
    assert "96 (student) and 100 (teacher)" in line


def test_classes_in_another_order_are_matched_by_name(tmp_path, caplog):
    names, order = ["cat", "dog", "emu", "fox"], [2, 0, 3, 1]
    teacher = tiny(ViTForImageClassification, 1, id2label={i: names[k] for i, k in enumerate(order)})
    by_hand = copy.deepcopy(teacher)
    by_hand.config.id2label = dict(enumerate(names))
    back = torch.tensor([order.index(k) for k in range(4)])
    for parameter in by_hand.classifier.parameters():
        parameter.data = parameter.data[back]

    def run(with_teacher: Any) -> DKDTrainer:
        student = tiny(ViTForImageClassification, 0, id2label=dict(enumerate(names)))
        return trained(tmp_path, student, images(8), with_teacher, max_steps=3)

    with caplog.at_level(logging.WARNING, logger="hf_dkd"):
        by_name = run(teacher)
    assert ["Reordered" in r.message for r in caplog.records if r.name.startswith("hf_dkd")] == [True]
    assert logs_of(by_name) == logs_of(expected := run(by_hand))
    assert torch.equal(weights_of(by_name.model), weights_of(expected.model))


# ---- Scale ----

SPLITS = [{"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps} for steps in (1, 2, 4)]


@pytest.mark.parametrize("distillation", ["dkd", "kd"])
@pytest.mark.parametrize(
    ("model", "examples"),
    [
        (BertForSequenceClassification, sentences(8)),
        (BertForTokenClassification, tagged([6, 1, 3, 5, 2, 1, 4, 6])),
        (BertForTokenClassification, tagged([0, 0, 3, 5, 2, 1, 0, 0])),
    ],
)
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_split(tmp_path, model, examples, distillation):
    def run(split: dict[str, int]) -> tuple[Tensor, dict[str, float]]:
        args = arguments(tmp_path, distillation=distillation, **split)
        trainer = DKDTrainer(tiny(model, 0), args, train_dataset=examples, teacher=tiny(model, 1))
        return first_gradient(trainer), logs_of(trainer)[0]

    (whole, log), *others = (run(split) for split in SPLITS)
    expected = expected_logs(tiny(model, 0), tiny(model, 1), examples)
    assert (log["ce"], log["tckd"]) == pytest.approx((expected["ce"], expected["tckd"]), rel=1e-5)
    for gradient, other in others:
        assert_close(gradient, whole)
        assert other == pytest.approx(log, rel=1e-5, abs=1e-6)


def test_the_gradient_of_a_model_that_takes_no_count_does_not_depend_on_the_split_either(tmp_path):
    def gradient(split: dict[str, int]) -> Tensor:
        args = arguments(tmp_path, dkd_head="classification", **split)
        return first_gradient(DKDTrainer(OwnModel(0), args, train_dataset=images(8), teacher=OwnModel(1)))

    whole, *others = (gradient(split) for split in SPLITS)
    for other in others:
        assert_close(other, whole)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("distillation", ["dkd", "kd"])
def test_a_step_without_any_label_has_no_loss_and_no_gradient(tmp_path, split, distillation):
    student, teacher = tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1)
    args = arguments(tmp_path, distillation=distillation, **split)
    trainer = DKDTrainer(student, args, train_dataset=tagged([0] * 8), teacher=teacher)
    gradient = first_gradient(trainer)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    (log,) = logs_of(trainer)
    assert [log[name] for name in ("loss", "ce", "dkd", "tckd", "nckd", "teacher_agreement")] == [0.0] * 6
