"""ROUGE, BLEU and chrF against numbers counted by hand, and through `evaluate.load` by path."""

import math
from pathlib import Path

import evaluate
import pytest

import hf_dkd
from hf_dkd.metrics.rouge import Rouge
from hf_dkd.metrics.sacrebleu import SacreBLEU

FOLDER = Path(hf_dkd.__file__).parent / "metrics"


def test_rouge_by_hand() -> None:
    # Shared: 3 of 4 and 3 words; one pair, "the cat", of 3 and 2; the longest common subsequence is "the cat sat".
    found = Rouge().compute(predictions=["the cat today sat"], references=["the cat sat"])
    assert found == {
        "rouge1": pytest.approx(2 * 3 / (4 + 3)),
        "rouge2": pytest.approx(2 * 1 / (3 + 2)),
        "rougeL": pytest.approx(2 * 3 / (4 + 3)),
    }


def test_rouge_l_minds_the_order_and_rouge_1_does_not() -> None:
    found = Rouge().compute(predictions=["sat cat the"], references=["the cat sat"])
    assert found == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": pytest.approx(1 / 3)}


def test_rouge_is_a_mean_over_examples_and_an_empty_text_counts_0() -> None:
    found = Rouge().compute(predictions=["the cat", ""], references=["the cat", "the dog"])
    assert found == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_rouge_stems_unless_told_otherwise() -> None:
    texts = {"predictions": ["cats running"], "references": ["cat runs"]}
    assert Rouge().compute(**texts)["rouge1"] == 1.0
    assert Rouge().compute(**texts, use_stemmer=False)["rouge1"] == 0.0


def test_bleu_by_hand() -> None:
    # Precisions 5/6, 3/5, 2/4 and 1/3 of a text as long as its reference.
    found = SacreBLEU().compute(predictions=["a b c d e x"], references=["a b c d y e"])
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))


def test_bleu_counts_over_the_corpus_with_a_penalty_for_brevity() -> None:
    # Every n-gram is right, 8 of 10 words are there: the mean over examples would be another number.
    found = SacreBLEU().compute(predictions=["a b c d e", "f g h"], references=["a b c d e", "f g h i j"])
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 10 / 8))


def test_chrf_by_hand() -> None:
    # Of the characters 1/2, of the pairs 0; longer n-grams do not exist, and β is 2.
    found = SacreBLEU().compute(predictions=["ab"], references=["ac"])
    assert found["chrf"] == pytest.approx(100 * (1 / 2 + 0) / 2)
    assert SacreBLEU().compute(predictions=["Häuser"], references=["Häuser"])["chrf"] == pytest.approx(100)


def test_tokenize_splits_scripts_without_spaces() -> None:
    texts = {"predictions": ["我喜欢你们的猫"], "references": ["我喜欢你们的狗"]}
    assert SacreBLEU().compute(**texts)["bleu"] == 0.0
    assert SacreBLEU().compute(**texts, tokenize="zh")["bleu"] > 50


def test_they_load_by_path() -> None:
    texts = {"predictions": ["the cat sat there"], "references": ["the cat sat there"]}
    assert evaluate.load(str(FOLDER / "rouge.py")).compute(**texts)["rougeL"] == 1.0
    assert evaluate.load(str(FOLDER / "sacrebleu.py")).compute(**texts)["bleu"] == pytest.approx(100)
