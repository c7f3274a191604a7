"""Tiny language models, a tokenizer of whole words and data on disk, for the recipes that generate."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROMANCE = ("nul", "un", "deux", "trois", "quatre", "cinq", "six_", "sept", "huit", "neuf")
PAD, EOS, BOS = "<pad>", "</s>", "<s>"
_OTHERS = (PAD, EOS, BOS, "<unk>", "\n", "count", ":")
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def tiny_tokenizer(words: Iterable[str] = (*WORDS, *ROMANCE), template: str = "$A") -> PreTrainedTokenizerFast:
    """A token for each word and for the end of a line; `template` adds BOS or EOS to each text, as in "<s> $A </s>"."""
    vocabulary = {word: index for index, word in enumerate((*_OTHERS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    special = [(token, vocabulary[token]) for token in (BOS, EOS) if token in template]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token="<unk>"
    )


def words_of(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """The words of token ids, "." for -100."""
    return " ".join("." if index == -100 else tokenizer.convert_ids_to_tokens(index) for index in ids)


def save_tiny(
    folder: Path, model_class: type[PreTrainedModel], seed: int = 0, template: str = "$A", **config: Any
) -> Path:
    """A model of random weights and its tokenizer, as a model directory."""
    tokenizer = tiny_tokenizer(template=template)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    set_seed(seed)
    model_class(model_class.config_class(**ids | {"vocab_size": len(tokenizer)} | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def counting(count: int, seed: int) -> list[str]:
    """Lines that count up from somewhere, with one word in ten drawn at random."""
    source = random.Random(seed)
    lines = []
    for _ in range(count):
        at, words = source.randrange(10), []
        for _ in range(source.randint(6, 14)):
            at = source.randrange(10) if source.random() < 0.1 else (at + 1) % 10
            words.append(WORDS[at])
        lines.append(" ".join(words))
    return lines


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_lines(path, [json.dumps(row) for row in rows])
