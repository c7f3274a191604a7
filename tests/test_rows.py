import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

from hf_dkd.heads import Head
from hf_dkd.rows import (
    aligned_labels,
    class_weights,
    count_labelled,
    has_labels,
    label_columns,
    logits_of,
    rows_beside,
    with_some_label,
    without_labels_from,
)

from .models import ARCHITECTURES, LENGTH

IGNORED = -100


def rows_of(head: Head, outputs: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    labels = aligned_labels(head, batch)
    return rows_beside(labels, logits_of(outputs, "student", head), "student"), labels.flatten()


def assert_rows_give_the_models_own_loss(head: Head, model: Any, batch: dict[str, Tensor]) -> None:
    outputs = model(**batch)
    logits, labels = rows_of(head, outputs, batch)
    torch.testing.assert_close(cross_entropy(logits, labels), outputs.loss, rtol=0, atol=1e-6)
    assert len(logits) == len(labels)
    assert count_labelled(head, batch) == (labels != IGNORED).sum()


# ---- Where the labels stand ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cross_entropy_over_rows_is_the_models_own_loss(name: str) -> None:
    model, batch = ARCHITECTURES[name]()
    assert_rows_give_the_models_own_loss(ARCHITECTURES[name].head, model, batch)


def test_shift_labels_of_a_collator_stand_beside_the_logits() -> None:
    model, batch = ARCHITECTURES["llama"]()
    shifted = batch["labels"].roll(-1, 1)
    shifted[:, -1] = IGNORED
    shifted[:3, 2] = IGNORED
    batch["shift_labels"] = shifted
    assert_rows_give_the_models_own_loss(Head.CAUSAL_LM, model, batch)
    del batch["labels"]
    assert has_labels(Head.CAUSAL_LM, batch)
    assert count_labelled(Head.CAUSAL_LM, batch) == (shifted != IGNORED).sum()


def test_the_first_token_of_a_causal_lm_is_no_label() -> None:
    batch = {"labels": torch.tensor([[7, 8, IGNORED, 9]])}
    assert aligned_labels(Head.CAUSAL_LM, batch).tolist() == [[8, IGNORED, 9, IGNORED]]
    assert aligned_labels(Head("lm"), batch).tolist() == [[7, 8, IGNORED, 9]]
    assert count_labelled(Head.CAUSAL_LM, batch) == 2
    assert count_labelled(Head.LM, batch) == 3


def test_labels_of_shape_batch_by_one_are_classes() -> None:
    assert aligned_labels(Head.CLASSIFICATION, {"labels": torch.tensor([[2], [0]])}).tolist() == [2, 0]


def test_labels_under_a_name_of_their_own() -> None:
    batch = {"input_ids": torch.ones(2, 3), "targets": torch.tensor([1, 0])}
    assert has_labels(Head.CLASSIFICATION, batch, ["targets"])
    assert aligned_labels(Head.CLASSIFICATION, batch, ["targets"]).tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_answers_outside_the_window_are_ignored_as_the_head_does(shape: tuple[int, ...]) -> None:
    model, batch = ARCHITECTURES["bert_qa"]()
    batch["start_positions"][[1, 4]] = torch.tensor([LENGTH, LENGTH + 50])
    batch["end_positions"][[1, 4]] = torch.tensor([LENGTH + 1, LENGTH])
    batch["start_positions"][2] = -3  # the head clamps it to 0
    batch |= {name: batch[name].reshape(shape) for name in ("start_positions", "end_positions")}
    assert count_labelled(Head.QUESTION_ANSWERING, batch) == 2 * 6
    assert_rows_give_the_models_own_loss(Head.QUESTION_ANSWERING, model, batch)


def test_padding_is_no_answer_to_student_or_teacher() -> None:
    student, batch = ARCHITECTURES["bert_qa"](seed=0)
    teacher = ARCHITECTURES["bert_qa"].model(seed=1)
    labels = aligned_labels(Head.QUESTION_ANSWERING, batch)
    padding = (batch["attention_mask"] == 0).repeat(2, 1)
    assert padding.any()
    for model, whose in ((student, "student"), (teacher, "teacher")):
        logits = logits_of(model(**batch), whose)
        assert logits.shape == (2, 8, LENGTH)
        rows = rows_beside(labels, logits, whose, batch["attention_mask"])
        assert (rows[padding] == -torch.inf).all()
        torch.testing.assert_close(rows[~padding], logits.flatten(0, 1)[~padding], rtol=0, atol=0)
        assert (rows.softmax(1)[padding] == 0).all()


def test_examples_that_fill_a_batch_up_lose_their_labels() -> None:
    for name in ("bert", "bert_tokens", "gpt2", "t5", "bert_qa"):
        head, batch = ARCHITECTURES[name].head, ARCHITECTURES[name].batch()
        kept = without_labels_from(head, batch, 5)
        first_five = {column: value[:5] for column, value in batch.items()}
        assert count_labelled(head, kept) == count_labelled(head, first_five)
        assert count_labelled(head, batch) > count_labelled(head, kept)


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2", "t5", "bert_choice", "bert_qa"])
def test_a_label_is_made_up_only_where_there_is_none(name: str) -> None:
    head, (model, batch) = ARCHITECTURES[name].head, ARCHITECTURES[name]()
    kept = with_some_label(head, batch, count_labelled(head, batch))
    assert all(torch.equal(kept[column], value) for column, value in batch.items())
    empty = without_labels_from(head, batch, 0)
    assert count_labelled(head, empty) == 0
    filled = with_some_label(head, empty, count_labelled(head, empty))
    assert count_labelled(head, empty) == 0
    assert count_labelled(head, filled) == (2 if head is Head.QUESTION_ANSWERING else 1)
    assert model(**filled).loss.isfinite()
    assert model(**empty).loss.isnan()


# ---- What cannot be a label ----


def test_missing_labels_name_what_was_expected_and_what_is_there() -> None:
    batch = {"input_ids": torch.ones(2, 3), "start_positions": torch.zeros(2)}
    assert not has_labels(Head.CLASSIFICATION, batch)
    assert not has_labels(Head.QUESTION_ANSWERING, batch)
    with pytest.raises(ValueError, match=r"expected labels .* got input_ids, start_positions"):
        aligned_labels(Head.CLASSIFICATION, batch)
    with pytest.raises(ValueError, match=r"question_answering head: expected start_positions, end_positions"):
        aligned_labels(Head.QUESTION_ANSWERING, batch)


@pytest.mark.parametrize(("head", "value"), [(Head.CAUSAL_LM, None), (Head.CLASSIFICATION, torch.zeros(2, 3))])
def test_shift_labels_alone_are_labels_of_a_causal_lm_only(head: Head, value: Tensor | None) -> None:
    batch = {"input_ids": torch.ones(2, 3), "shift_labels": value}
    assert not has_labels(head, batch)
    with pytest.raises(ValueError, match="no labels"):
        aligned_labels(head, batch)


def test_labels_of_a_regression_are_refused_but_count_an_example_each() -> None:
    batch = {"labels": torch.zeros(8)}
    with pytest.raises(ValueError, match=re.escape("torch.float32 of shape (8,)")):
        aligned_labels(Head.CLASSIFICATION, batch)
    assert count_labelled(Head.CLASSIFICATION, batch) == 8


@pytest.mark.parametrize("head", [Head.CLASSIFICATION, Head.MULTI_LABEL])
def test_a_number_for_each_class_is_a_row_an_example(head: Head) -> None:
    batch = {"labels": torch.rand(8, 5)}
    assert class_weights(head, batch) is batch["labels"]
    assert aligned_labels(head, batch).tolist() == [0] * 8
    assert count_labelled(head, batch) == 8
    assert class_weights(head, {"labels": torch.arange(8)}) is None
    assert class_weights(Head.TOKEN_CLASSIFICATION, batch) is None


def test_question_answering_needs_the_length_of_its_window() -> None:
    with pytest.raises(ValueError, match=r"neither, but pixel_values, start_positions, end_positions"):
        aligned_labels(
            Head.QUESTION_ANSWERING, dict.fromkeys(("pixel_values", "start_positions", "end_positions"), torch.zeros(2))
        )


# ---- Where the logits are ----


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert_tokens", "bert_choice", "bert_mlm", "bert_qa", "gpt2"])
def test_logits_in_a_tuple_are_those_in_a_dictionary(name: str, labelled: bool) -> None:
    head, (model, batch) = ARCHITECTURES[name].head, ARCHITECTURES[name]()
    model.eval()
    if not labelled:
        batch = {column: value for column, value in batch.items() if column not in label_columns(head)}
    in_a_tuple, in_a_dictionary = (model(**batch, return_dict=kind) for kind in (False, True))
    torch.testing.assert_close(
        logits_of(in_a_tuple, "student", head), logits_of(in_a_dictionary, "student", head), rtol=0, atol=0
    )


def test_logits_may_come_bare_or_in_any_mapping() -> None:
    logits = torch.randn(4, 3)
    for outputs in (logits, (logits,), [logits], {"logits": logits}, ModelOutput(logits=logits)):
        assert logits_of(outputs, "teacher") is logits


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        ({"loss": torch.tensor(1.0), "hidden_states": ()}, "loss, hidden_states"),
        ({"logits": None, "loss": torch.tensor(1.0)}, "logits, loss"),
        ((torch.tensor(1.0),), "a tuple without a tensor of two or more dimensions"),
    ],
)
def test_outputs_without_logits_name_what_there_is_and_the_remedy(outputs: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"student's outputs hold no logits \(found: {found}\).*use_liger_kernel"):
        logits_of(outputs, "student")


@pytest.mark.parametrize("shape", [(8, 11, 5), (8, 5), (7, 12, 5)])
def test_logits_that_do_not_stand_beside_their_labels_name_both_shapes(shape: tuple[int, ...]) -> None:
    message = rf"teacher's logits have shape {re.escape(str(shape))} for labels of shape \(8, 12\)"
    with pytest.raises(ValueError, match=message):
        rows_beside(torch.zeros(8, 12, dtype=torch.long), torch.zeros(shape), "teacher")


def test_a_batch_without_labels_has_no_labelled_rows() -> None:
    model, batch = ARCHITECTURES["bert_tokens"]()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    logits, labels = rows_of(Head.TOKEN_CLASSIFICATION, model(**batch), batch)
    assert logits.shape == (len(labels), 5)
    assert (labels == IGNORED).all()
    assert count_labelled(Head.TOKEN_CLASSIFICATION, batch) == 0
