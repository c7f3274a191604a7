"""Entity-level F1 of tagged sequences (IOB2 and the like), as the CoNLL evaluation counts it."""

import datasets
import evaluate
from seqeval.metrics import f1_score, precision_score, recall_score


class EntityF1(evaluate.Metric):
    """`compute(predictions=tags, references=tags)` → `{"precision", "recall", "f1"}`, each in [0, 1].

    Both are lists of sequences of tags such as `"B-person"`; an entity counts if its span and its type agree.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = {name: datasets.List(datasets.Value("string")) for name in ("predictions", "references")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(tags))

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        return {name: float(score(references, predictions, zero_division=0)) for name, score in scores.items()}
