"""ROUGE: how many words, pairs of words and common subsequences a summary shares with a reference (Lin 2004)."""

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    """`compute(predictions=texts, references=texts, use_stemmer=True)` → `{"rouge1", "rouge2", "rougeL"}`, in [0, 1].

    Each is the mean over examples of an F1. Words are runs of a-z and 0-9, so that other scripts count for nothing;
    the stemmer is an English one.
    """

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(texts))

    def _compute(self, predictions: list[str], references: list[str], use_stemmer: bool = True) -> dict[str, float]:
        scorer = RougeScorer(TYPES, use_stemmer=use_stemmer)
        scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in TYPES}
