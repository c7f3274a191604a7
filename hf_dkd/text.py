"""Token ids and labels of texts: blocks of packed ones, prompts that carry no loss, tags at the subwords of words."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from datasets import DatasetDict

from .cache_format import manifest_of

IGNORED = -100

Examples = dict[str, list[list[int]]]


def pack_texts(tokenizer: Any, texts: Sequence[str | None], size: int, ending: str = "") -> Examples:
    """Join texts and cut them into blocks, for a causal language model.

    Args:
        tokenizer: of transformers. It adds no special tokens: what is to stand between texts is in `ending`.
        texts: None counts as an empty one.
        size: tokens in a block; the last one is shorter.
        ending: put behind each text, such as a line break or `tokenizer.eos_token`.

    Returns:
        `input_ids` of the blocks, and `labels`, the same. Nothing is predicted in a block of one token: it is left out.

    Raises:
        ValueError: for a size below 2.
    """
    stream = list(chain.from_iterable(_tokens(tokenizer, texts, size, ending)))
    blocks = [stream[first : first + size] for first in range(0, len(stream) - 1, size)]
    return {"input_ids": blocks, "labels": blocks}


def mask_prompts(
    tokenizer: Any, prompts: Sequence[str | None] | None, completions: Sequence[str | None], size: int, ending: str = ""
) -> Examples:
    """Put completions behind their prompts, which carry no loss, for a causal language model.

    Args:
        tokenizer: of transformers. Where it puts BOS before a text, BOS comes before the prompt too.
        prompts: None counts as an empty one; without any, the completions are texts that stand alone.
        completions: as many.
        size: most tokens in an example. Where both are longer, the completion and the end of the prompt stay.
        ending: put behind each completion, such as `tokenizer.eos_token`.

    Returns:
        `input_ids`, and `labels`, -100 in the prompt. Nothing is predicted in an example of one token: it is left out.

    Raises:
        ValueError: for a size below 2, and where there are not as many prompts as completions.
    """
    if prompts is not None and len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; expected as many.")
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []
    starts = _tokens(tokenizer, [None] * len(completions) if prompts is None else prompts, size)
    examples: Examples = {"input_ids": [], "labels": []}
    for start, end in zip(starts, _tokens(tokenizer, completions, size, ending), strict=True):
        end = end[:size]
        start = [*bos, *start]
        start = start[max(len(start) + len(end) - size, 0) :]
        if len(start) + len(end) > 1:
            examples["input_ids"].append(start + end)
            examples["labels"].append([IGNORED] * len(start) + end)
    return examples


def subword_labels(
    word_ids: Sequence[int | None], tags: Sequence[int], later: Sequence[int] | None = None
) -> list[int]:
    """A label for each subword: the tag of its word at the word's first subword, -100 at special tokens.

    Args:
        word_ids: of each subword the number of its word, None for special tokens: `tokenizer(…).word_ids()`.
        tags: of each word.
        later: what becomes of a tag at the word's other subwords, such as `continued(names)`; by default -100.

    Raises:
        ValueError: for a word without a tag.
    """
    last = max((word for word in word_ids if word is not None), default=-1)
    if last >= len(tags):
        raise ValueError(
            f"{len(tags)} tags, but subwords of word {last}, counted from 0; expected a tag for each word."
        )
    labels = []
    for word, before in zip(word_ids, [None, *word_ids[:-1]], strict=True):
        if word is None:
            labels.append(IGNORED)
        elif word != before:
            labels.append(tags[word])
        else:
            labels.append(IGNORED if later is None else later[tags[word]])
    return labels


def continued(names: Sequence[str]) -> list[int]:
    """For each tag the number of the one that continues its entity: that of I-x for B-x and I-x, else the tag's own.

    So does a word's first subword begin an entity, and its other subwords continue it.

    Args:
        names: the tags, such as `"B-person"`, by number.
    """
    return [names.index(f"I-{tag[2:]}") if f"I-{tag[2:]}" in names else index for index, tag in enumerate(names)]


def _tokens(tokenizer: Any, texts: Sequence[str | None], size: int, ending: str = "") -> list[list[int]]:
    if size < 2:
        raise ValueError(f"size is {size}; expected 2 or more tokens, of which the first predicts the second.")
    filled = [(text or "") + ending for text in texts]
    return tokenizer(filled, add_special_tokens=False).input_ids if filled else []


def tokenized(rows: Any, args: Any, tokenize: Callable[..., dict[str, list]], **options: Any) -> Any:
    """What `tokenize` makes of batches of rows in place of their columns; by the main process first, with its bar.

    Args:
        rows: a data set, or splits, which stay as they are where they hold a teacher's cached outputs.
        args: the training arguments.
        options: keywords of `tokenize`.
    """
    first = rows["train"] if isinstance(rows, DatasetDict) else rows
    if manifest_of(first) is not None:
        return rows
    with args.main_process_first(desc="tokenizing"):
        return rows.map(tokenize, batched=True, remove_columns=first.column_names, fn_kwargs=options, desc="Tokenizing")
