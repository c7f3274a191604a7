from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dkd.text import continued, mask_prompts, pack_texts, subword_labels

from .recipes.lm_assets import WORDS, tiny_tokenizer, words_of

PLAIN, WITH_BOS = tiny_tokenizer(), tiny_tokenizer(template="<s> $A")


def words(examples: dict[str, list[list[int]]]) -> list[tuple[str, str]]:
    """The words of each example and of its labels, "." where there is none."""
    pairs = zip(examples["input_ids"], examples["labels"], strict=True)
    return [(words_of(ids, PLAIN), words_of(labels, PLAIN)) for ids, labels in pairs]


def test_packing_joins_texts_and_leaves_no_block_of_one_token() -> None:
    texts = ["one two", "", None, "three four five"]
    assert words(pack_texts(PLAIN, texts, 2)) == [("one two", "one two"), ("three four", "three four")]
    expected = [("one two </s>",) * 2, ("</s> </s> three",) * 2, ("four five </s>",) * 2]
    assert words(pack_texts(WITH_BOS, texts, 3, "</s>")) == expected
    assert words(pack_texts(PLAIN, [], 2)) == []


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.lists(st.sampled_from(WORDS))), st.integers(2, 7))
def test_blocks_are_the_texts_in_order(texts: list[list[str]], size: int) -> None:
    blocks = pack_texts(PLAIN, [" ".join(text) for text in texts], size, "</s>")["input_ids"]
    stream = [word for text in texts for word in (*text, "</s>")]
    found = [word for block in blocks for word in words_of(block, PLAIN).split()]
    assert found == (stream[:-1] if len(stream) % size == 1 else stream)
    assert all(len(block) == size for block in blocks[:-1])


def test_texts_without_prompts_stand_alone() -> None:
    texts = ["one two three", "", "four"]
    assert words(mask_prompts(PLAIN, None, texts, 2)) == [("one two",) * 2]
    found = words(mask_prompts(WITH_BOS, None, texts, 8, "</s>"))
    assert found == [(f"<s> {text}", f". {text}") for text in ("one two three </s>", "</s>", "four </s>")]


def test_prompts_are_masked_and_give_way_to_the_completion() -> None:
    prompts, completions = ["one two three", "four"], ["five", "six seven eight nine"]
    assert words(mask_prompts(WITH_BOS, prompts, completions, 8, "</s>")) == [
        ("<s> one two three five </s>", ". . . . five </s>"),
        ("<s> four six seven eight nine </s>", ". . six seven eight nine </s>"),
    ]
    expected = [("two three five </s>", ". . five </s>"), ("six seven eight nine", "six seven eight nine")]
    assert words(mask_prompts(PLAIN, prompts, completions, 4, "</s>")) == expected


def test_sizes_and_counts_that_do_not_fit_are_refused() -> None:
    for size in (1, 0, -3):
        with pytest.raises(ValueError, match=f"size is {size}; expected 2 or more tokens"):
            pack_texts(PLAIN, ["one two"], size)
        with pytest.raises(ValueError, match=f"size is {size}; expected 2 or more tokens"):
            mask_prompts(PLAIN, None, ["one two"], size)
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        mask_prompts(PLAIN, ["one"], ["two", "three"], 8)


def test_the_first_subword_of_a_word_has_its_tag() -> None:
    subwords: list[Any] = [None, 0, 0, 1, 2, 2, 2, 4, None]  # the fourth word has none
    tags = [1, 2, 0, 3, 0]
    assert subword_labels(subwords, tags) == [-100, 1, -100, 2, 0, -100, -100, 0, -100]
    assert subword_labels(subwords, tags, later=[0, 2, 2, 3]) == [-100, 1, 2, 2, 0, 0, 0, 0, -100]
    assert subword_labels(subwords[:4], tags) == [-100, 1, -100, 2], "cut off"
    assert subword_labels([None, None], []) == [-100, -100]
    with pytest.raises(ValueError, match="4 tags, but subwords of word 4, counted from 0"):
        subword_labels(subwords, tags[:4])


def test_the_inside_of_an_entity_continues_its_beginning() -> None:
    assert continued(["O", "B-a", "I-a", "B-b", "I-c"]) == [0, 2, 2, 3, 4]
    assert continued(["I-a", "B-a", "O"]) == [0, 0, 2]
