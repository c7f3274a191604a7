"""Tiny text models and data on disk: sentences whose class, or whose tags, their words tell."""

import csv
import random
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertTokenizerFast, PreTrainedModel, set_seed

SUBJECTS = ("card", "cash", "transfer", "account")
FILLERS = (
    "my",
    "the",
    "a",
    "please",
    "help",
    "where",
    "is",
    "when",
    "will",
    "with",
    "from",
    "to",
    "it",
    "not",
    "still",
)
WORDS = (*SUBJECTS, *FILLERS)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def save_tiny_bert(
    folder: Path, model_class: type[PreTrainedModel], words: tuple[str, ...] = WORDS, **config: Any
) -> Path:
    """A BERT of random weights and its tokenizer over `words`, as a model directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join((*_SPECIAL, *words)))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    set_seed(0)
    model_class(BertConfig(vocab_size=len(tokenizer), **_TINY | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[dict[str, str]]:
    """Random sentences of 4 to 8 words, with their one subject as the label."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        words = source.choices(FILLERS, k=source.randint(3, 7))
        label = source.choice(SUBJECTS)
        words.insert(source.randrange(len(words)), label)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
