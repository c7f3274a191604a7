import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    BatchEncoding,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_dkd import DataCollatorForMixup, DataCollatorWithTeacherInputs, Teacher

from .models import ARCHITECTURES

WORDS = ["the", "small", "student", "learns", "from", "a", "larger", "teacher"]
SENTENCES = ["the small student learns", "a teacher", "the student learns from the larger teacher"]
SIZE = 4


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One id for each word, in the order of `words`."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")
    fast.model_input_names = ["input_ids", "attention_mask"]
    return fast


STUDENT_TOKENIZER = tokenizer(WORDS)
TEACHER_TOKENIZER = tokenizer(WORDS[::-1])


def small_pixels(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([example["image"][:, ::2, ::2] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def large_pixels(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([2 * example["image"] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def texts() -> list[dict[str, Any]]:
    examples = []
    for label, sentence in enumerate(SENTENCES):
        of_teacher = TEACHER_TOKENIZER(sentence + " from a teacher")
        examples.append(
            {**STUDENT_TOKENIZER(sentence), "label": label, **{f"teacher_{n}": v for n, v in of_teacher.items()}}
        )
    return examples


def images() -> list[dict[str, Any]]:
    return [{"image": torch.randn(3, SIZE, SIZE), "label": label} for label in range(3)]


def of_two_tokenizers() -> DataCollatorWithTeacherInputs:
    return DataCollatorWithTeacherInputs(
        DataCollatorWithPadding(STUDENT_TOKENIZER), DataCollatorWithPadding(TEACHER_TOKENIZER)
    )


COLLATORS = {
    "two tokenizers": (of_two_tokenizers, texts),
    "two image sizes": (lambda: DataCollatorWithTeacherInputs(small_pixels, large_pixels), images),
}


def test_each_tokenizer_pads_its_own_columns() -> None:
    batch = of_two_tokenizers()(texts())
    student = STUDENT_TOKENIZER(SENTENCES, padding=True, return_tensors="pt")
    teacher = TEACHER_TOKENIZER([f"{s} from a teacher" for s in SENTENCES], padding=True, return_tensors="pt")
    assert batch.keys() == {
        "input_ids",
        "attention_mask",
        "labels",
        "teacher_input_ids",
        "teacher_attention_mask",
    }
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], student[name])
        assert torch.equal(batch[f"teacher_{name}"], teacher[name])
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["input_ids"].shape == (3, 7)
    assert batch["teacher_input_ids"].shape == (3, 10)


def test_each_processor_reads_the_shared_image() -> None:
    examples = images()
    batch = DataCollatorWithTeacherInputs(small_pixels, large_pixels)(examples)
    assert batch.keys() == {"pixel_values", "labels", "teacher_pixel_values"}
    assert torch.equal(batch["pixel_values"], torch.stack([e["image"] for e in examples])[..., ::2, ::2])
    assert torch.equal(batch["teacher_pixel_values"], 2 * torch.stack([e["image"] for e in examples]))


def test_a_teacher_reads_what_its_collator_made() -> None:
    batch = of_two_tokenizers()(texts())
    model = ARCHITECTURES["bert"].model().eval()
    with torch.no_grad():
        expected = model(batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]).logits
    torch.testing.assert_close(Teacher(model).logits(batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
def test_labels_of_the_teachers_collator_are_dropped(name: str) -> None:
    def of_teacher(examples: list[Any]) -> Mapping[str, Tensor]:
        return {"input_ids": torch.zeros(len(examples), 2), name: torch.full((len(examples),), 9)}

    batch = DataCollatorWithTeacherInputs(default_data_collator, of_teacher)(
        [{"x": 1.0, "label": 2}, {"x": 2.0, "label": 0}]
    )
    assert batch.keys() == {"x", "labels", "teacher_input_ids"}


def test_token_labels_reach_the_students_collator_only() -> None:
    examples = [
        {**STUDENT_TOKENIZER(s), "labels": [1] * len(s.split()), "teacher_input_ids": [5] * len(s.split())}
        for s in SENTENCES
    ]
    batch = DataCollatorWithTeacherInputs(
        DataCollatorForTokenClassification(STUDENT_TOKENIZER), DataCollatorForTokenClassification(TEACHER_TOKENIZER)
    )(examples)
    assert batch["labels"].tolist()[1] == [1, 1, -100, -100, -100, -100, -100]
    assert "teacher_labels" not in batch
    assert batch["teacher_input_ids"].shape == (3, 7)


@pytest.mark.parametrize("name", COLLATORS)
def test_examples_are_left_as_they_were(name: str) -> None:
    make, make_examples = COLLATORS[name]
    examples = make_examples()
    before = copy.deepcopy(examples)
    make()(examples)
    assert [example.keys() for example in examples] == [example.keys() for example in before]
    for example, old in zip(examples, before, strict=True):
        for key, value in example.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(old[key]))


def test_a_collator_that_empties_its_examples_leaves_them_to_the_other() -> None:
    def emptying(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"x": torch.stack([example.pop("x") for example in examples])}

    examples = [{"x": torch.ones(2)}, {"x": torch.zeros(2)}]
    batch = DataCollatorWithTeacherInputs(emptying, emptying)(examples)
    assert torch.equal(batch["x"], batch["teacher_x"])
    assert all("x" in example for example in examples)


def test_columns_for_the_teacher_in_only_some_examples_are_an_error_that_names_the_first_without() -> None:
    examples = texts()
    examples[1] = {name: value for name, value in examples[1].items() if not name.startswith("teacher_")}
    with pytest.raises(ValueError, match=r"Example 1 of the batch has no column.*'teacher_'.*attention_mask, label\."):
        of_two_tokenizers()(examples)


def test_any_mapping_is_an_example() -> None:
    examples = [BatchEncoding(example) for example in texts()]
    expected = of_two_tokenizers()(texts())
    batch = of_two_tokenizers()(examples)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_it_can_be_pickled_for_worker_processes() -> None:
    for collator, examples in (
        (of_two_tokenizers(), texts()),
        (DataCollatorWithTeacherInputs(small_pixels, large_pixels), images()),
    ):
        batch, expected = pickle.loads(pickle.dumps(collator))(examples), collator(examples)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


# ---- Mixup and CutMix ----


def constant_images(examples: list[int]) -> dict[str, Tensor]:
    """Image number i is i everywhere, and of class i; the teacher's twice as large."""
    values = torch.tensor(examples, dtype=torch.float32)[:, None, None, None]
    return {
        "pixel_values": values.expand(-1, 3, 8, 12),
        "teacher_pixel_values": values.expand(-1, 3, 16, 24),
        "labels": torch.tensor(examples),
    }


def mixtures(alpha: dict[str, Any], count: int = 40) -> list[dict[str, Tensor]]:
    collator = DataCollatorForMixup(constant_images, num_classes=9, **alpha)
    return [collator.for_training([first % 9, (first + 1) % 9, (first + 4) % 9]) for first in range(count)]


def test_mixup_mixes_images_and_labels_by_the_same_share() -> None:
    for batch in mixtures({"mixup_alpha": 0.8, "cutmix_alpha": 0.0}):
        values = batch["labels"] @ torch.arange(9.0)
        for name in ("pixel_values", "teacher_pixel_values"):
            expected = values[:, None, None, None].expand_as(batch[name])
            torch.testing.assert_close(batch[name], expected)
        torch.testing.assert_close(batch["labels"].sum(1), torch.ones(3))
        assert ((batch["labels"] > 0).sum(1) <= 2).all()


SIZES = ("pixel_values", "teacher_pixel_values")


def _by_a_pixel(box: Tensor, step: int) -> Tensor:
    """A box grown (1) or shrunk (-1) by a pixel on each side."""
    grown = torch.nn.functional.max_pool2d((box if step > 0 else ~box)[None].float(), 3, 1, 1)[0].bool()
    return grown if step > 0 else ~grown


def test_cutmix_pastes_one_box_whose_share_is_in_the_labels() -> None:
    boxes = set()
    for first, batch in enumerate(mixtures({"mixup_alpha": 0.0, "cutmix_alpha": 1.0})):
        pixels, labels = batch["pixel_values"], batch["labels"]
        for image, weights in zip(pixels, labels, strict=True):
            shares = torch.stack([(image[0] == value).float().mean() for value in range(9)])
            torch.testing.assert_close(weights, shares)
        # The teacher sees the same box at twice the size, to a pixel of rounding at each border.
        own_value = torch.tensor([first % 9, (first + 1) % 9, (first + 4) % 9])[:, None, None]
        changed = [batch[name][:, 0] != own_value for name in SIZES]
        for own, taught in zip(*changed, strict=True):
            grown, shrunk = _by_a_pixel(own, 1), _by_a_pixel(own, -1)
            taught = taught.view(8, 2, 12, 2)
            assert not (taught.any(3).any(1) & ~grown).any()
            assert not (shrunk & ~taught.all(3).all(1)).any()
        row, column = (pixels[:, 0] != pixels[:, :1, 0, 0].unsqueeze(2)).nonzero()[:, 1:].unbind(1)
        if len(row):
            boxes.add((int(row.min()), int(row.max()), int(column.min()), int(column.max())))
    assert len(boxes) > 5


def test_with_both_each_batch_takes_one_of_them() -> None:
    batches = mixtures({"mixup_alpha": 0.8, "cutmix_alpha": 1.0})
    pasted = [bool((batch["pixel_values"] % 1 == 0).all()) for batch in batches]
    assert 8 < sum(pasted) < 32


def test_what_is_drawn_depends_on_the_batch_alone() -> None:
    first, second = mixtures({}), mixtures({})
    torch.manual_seed(7)
    third = mixtures({})
    for one, other, last in zip(first, second, third, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(one["pixel_values"], last["pixel_values"])
    assert not any(
        torch.equal(one["labels"], other["labels"]) for one, other in zip(first, mixtures({"seed": 1}), strict=True)
    )
    assert len({tuple(batch["labels"].flatten().tolist()) for batch in first[:9]}) == 9


def test_small_images_with_constant_pixels_are_mixed_anew_in_each_batch() -> None:
    generator = torch.Generator().manual_seed(0)

    def digits(examples: list[int]) -> dict[str, Tensor]:
        pixels = torch.zeros(len(examples), 1, 8, 8)  # with an empty border, as in scikit-learn's digits
        pixels[..., 2:6, 2:6] = torch.rand(len(examples), 1, 4, 4, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor(examples)}

    collator = DataCollatorForMixup(digits, num_classes=9)
    labels = {tuple(collator.for_training([0, 1, 2, 3])["labels"].flatten().tolist()) for _ in range(20)}
    assert len(labels) > 15, "by chance two are alike, as where a box is of no pixel"


def test_batches_for_evaluation_are_not_mixed() -> None:
    batch = DataCollatorForMixup(constant_images, num_classes=9)([3, 4])
    assert batch["labels"].tolist() == [3, 4]


@pytest.mark.parametrize("labels", [torch.tensor([3, 9]), torch.tensor([3, -100]), torch.rand(2), torch.rand(2, 9)])
def test_labels_that_cannot_be_mixed_are_refused(labels: Tensor) -> None:
    collator = DataCollatorForMixup(lambda examples: {**constant_images([1, 2]), "labels": labels}, num_classes=9)
    with pytest.raises(ValueError, match=r"mixing takes one class in \[0, 9\) for each image"):
        collator.for_training([1, 2])


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha is nan"),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, "both 0: nothing would be mixed"),
    ],
)
def test_shares_that_mix_nothing_are_refused(alpha: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCollatorForMixup(constant_images, num_classes=9, **alpha)
