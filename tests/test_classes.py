"""Rows of student and teacher brought to the same classes."""

from typing import Any

import pytest
import torch

from hf_dkd.classes import aligned_rows, check_mixed, check_one_label, check_weights, class_order, labelled_by_teacher
from hf_dkd.heads import Head

IGNORED = -100


def test_each_label_of_several_is_a_row_of_two_classes() -> None:
    student, teacher = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[0.5, 2.0], [-1.0, 6.0]])
    labels, order = torch.tensor([0, IGNORED]), torch.tensor([1, 0])
    rows = aligned_rows(Head.MULTI_LABEL, student, teacher, labels, order, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert rows.student.tolist() == [[0, 1], [0, -2], [0, 3], [0, 4]]
    assert rows.teacher.tolist() == [[0, 2], [0, 0.5], [0, 6], [0, -1]]
    assert rows.labels.tolist() == [1, 0, IGNORED, IGNORED]
    assert rows.per_example == 2
    unlabelled = aligned_rows(Head.MULTI_LABEL, student, teacher, torch.tensor([0, 1]))
    assert unlabelled.labels.tolist() == [1, 1, 0, 1], "the teacher's decisions"


def test_the_teacher_labels_the_rows_that_it_is_asked_for() -> None:
    teacher = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    aligned = aligned_rows(Head.CLASSIFICATION, torch.zeros(3, 3), teacher, torch.tensor([0, 2, IGNORED]))
    chosen = torch.tensor([True, False, False])
    assert labelled_by_teacher(aligned, chosen).labels.tolist() == [2, 2, IGNORED]
    assert labelled_by_teacher(aligned, chosen).by_teacher is chosen


def test_the_label_of_a_mixed_example_is_its_largest_share() -> None:
    weights = torch.tensor([[0.3, 0.7, 0.0], [1.0, 0.0, 0.0]])
    rows = aligned_rows(Head.CLASSIFICATION, torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 0]), None, weights)
    assert rows.labels.tolist() == [1, 0]
    assert rows.mixed is weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, 0.6, 0.0]], "do not sum to 1"),
        ([[1.5, -0.5, 0.0]], "negative"),
        ([[0.8, 0.1, 0.1]], "An example has 3 classes of positive weight; mixing gives two. Leave smoothing"),
    ],
)
def test_weights_that_are_no_mixture_of_two_are_refused(weights: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mixed(torch.tensor(weights))


def test_weights_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels have shape \(8, 5\) for logits of shape \(8, 4\)"):
        check_weights(Head.CLASSIFICATION, torch.zeros(8, 5), torch.zeros(8, 4))
    with pytest.raises(ValueError, match=r"go from -100 to 1; several labels per example are 0 or 1 each"):
        check_weights(Head.MULTI_LABEL, torch.tensor([[1.0, 0.0], [-100.0, -100.0]]), torch.zeros(2, 2))
    check_weights(Head.MULTI_LABEL, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))


@pytest.mark.parametrize("wrong", [5, 77, -1])
def test_a_label_outside_the_classes_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"label {wrong} is outside \[0, 5\)"):
        aligned_rows(Head.CLASSIFICATION, torch.zeros(3, 5), torch.zeros(3, 5), torch.tensor([0, wrong, 4]))


def test_a_row_without_a_label_is_in_no_class_and_none_too_many() -> None:
    rows = aligned_rows(Head.CLASSIFICATION, torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([IGNORED, 4]))
    assert rows.labels.tolist() == [IGNORED, 4]


def test_whole_numbers_for_each_class_are_told_to_be_floats() -> None:
    with pytest.raises(ValueError, match=r"torch.int64 of shape \(8, 5\): expected one.*cast them to float"):
        check_one_label(Head.CLASSIFICATION, torch.zeros(8, 5, dtype=torch.long))


def test_the_same_names_in_another_order_reorder_the_teachers_columns() -> None:
    student_names, teacher_names = ["cat", "dog", "eel"], ["eel", "cat", "dog"]
    order = class_order(student_names, teacher_names)
    assert order == [1, 2, 0]
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    rows = aligned_rows(Head.CLASSIFICATION, student, teacher, labels, torch.tensor(order))
    assert torch.equal(rows.student, student)
    assert torch.equal(rows.labels, labels)
    for column, name in enumerate(student_names):
        assert torch.equal(rows.teacher[:, column], teacher[:, teacher_names.index(name)])


@pytest.mark.parametrize(
    ("student_names", "teacher_names"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["cat", "dog"], ["LABEL_0", "LABEL_1"]),
        (["LABEL_0", "LABEL_1"], ["dog", "cat"]),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["cat", "cat"], ["cat", "cat"]),
        (None, ["cat", "dog"]),
        (["cat", "dog"], None),
    ],
)
def test_classes_in_the_same_order_need_no_permutation(student_names: Any, teacher_names: Any) -> None:
    assert class_order(student_names, teacher_names) is None


def test_different_names_are_an_error_that_lists_the_missing_ones() -> None:
    with pytest.raises(ValueError, match=r"the teacher lacks 'dog', the student lacks 'fox', 'owl'") as error:
        class_order(["cat", "dog"], ["fox", "cat", "owl"])
    assert "label_names=" in str(error.value)
    with pytest.raises(ValueError, match=r"'s9' and 10 more, the student lacks none"):
        class_order([f"s{index}" for index in range(20)] + ["cat", "dog"], ["dog", "cat"])


@pytest.mark.parametrize(
    ("student_names", "teacher_names"),
    [(["cat", "cat", "dog"], ["cat", "dog", "cat"]), (["cat", "dog"], ["dog", "cat", "cat"])],
)
def test_repeated_names_tell_no_order(student_names: list[str], teacher_names: list[str]) -> None:
    with pytest.raises(ValueError, match="repeat"):
        class_order(student_names, teacher_names)


@pytest.mark.parametrize("head", [Head.CLASSIFICATION, Head.TOKEN_CLASSIFICATION, Head.MULTIPLE_CHOICE])
def test_different_numbers_of_classes_are_an_error_with_both(head: Head) -> None:
    with pytest.raises(ValueError, match="student has 5 classes and the teacher 7"):
        aligned_rows(head, torch.zeros(2, 5), torch.zeros(2, 7), torch.tensor([0, 1]))


@pytest.mark.parametrize("head", [Head.LM, Head.CAUSAL_LM])
@pytest.mark.parametrize(("student_size", "teacher_size"), [(100, 112), (112, 100), (151936, 152064)])
def test_padding_rows_of_a_vocabulary_are_cut(head: Head, student_size: int, teacher_size: int) -> None:
    student, teacher, labels = torch.randn(6, student_size), torch.randn(6, teacher_size), torch.arange(6)
    shared = min(student_size, teacher_size)
    rows = aligned_rows(head, student, teacher, labels)
    assert torch.equal(rows.student, student[:, :shared])
    assert torch.equal(rows.teacher, teacher[:, :shared])
    with pytest.raises(ValueError, match=rf"label {shared} is outside \[0, {shared}\)"):
        aligned_rows(head, student, teacher, labels + shared)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(100, 115), (115, 100), (30000, 31024), (50257, 32000)])
def test_vocabularies_too_different_for_padding_are_an_error(student_size: int, teacher_size: int) -> None:
    message = rf"student has {student_size} classes and the teacher {teacher_size}.*tokenizer"
    with pytest.raises(ValueError, match=message):
        aligned_rows(Head.CAUSAL_LM, torch.zeros(2, student_size), torch.zeros(2, teacher_size), torch.zeros(2).long())


def test_one_class_is_a_regression() -> None:
    with pytest.raises(ValueError, match=r"one output, as for regression.*at least two classes"):
        aligned_rows(Head.CLASSIFICATION, torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 0]))


def test_names_for_classes_that_the_teachers_logits_lack_are_an_error() -> None:
    with pytest.raises(ValueError, match="student has 3 classes and the teacher 2"):
        aligned_rows(
            Head.CLASSIFICATION, torch.zeros(1, 3), torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2, 1, 0])
        )
