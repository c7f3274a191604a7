"""What to keep of a run's predictions, as columns of a table, and metrics counted anew from such columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from .accuracy import Accuracy
from .entity_f1 import EntityF1
from .language import TOKEN_SCORES
from .matthews import MatthewsCorrelation
from .rouge import Rouge
from .sacrebleu import SacreBLEU
from .tagging import tag_lists

_METRICS: dict[str, Any] = {
    "accuracy": Accuracy,
    "matthews_correlation": MatthewsCorrelation,
    "f1": EntityF1,
    "bleu": SacreBLEU,
    "rougeL": Rouge,
}


def class_columns(output: PredictionOutput) -> dict[str, Any]:
    """Of a classifier's predictions, logits (N, C) and labels (N,): the columns `label`, `prediction` and `logits`."""
    logits: Any = output.predictions
    return {"label": output.label_ids, "prediction": logits.argmax(axis=-1), "logits": logits}


def tag_columns(names: Sequence[str], output: PredictionOutput) -> dict[str, Any]:
    """Of a tagger's predictions, logits (N, L, C) and labels (N, L) with -100 at the tokens without a tag: the columns
    `label` and `prediction`, lists of tags by their `names`.
    """
    logits: Any = output.predictions
    tags = {"label": output.label_ids, "prediction": logits.argmax(axis=-1)}
    return {name: tag_lists(names, classes, output.label_ids) for name, classes in tags.items()}


def score_columns(output: PredictionOutput) -> dict[str, Any]:
    """Of a language model's predictions, which `token_scores` made (N, 3): a column for each of `TOKEN_SCORES`."""
    return dict(zip(TOKEN_SCORES, np.transpose(output.predictions), strict=True))


def metric_of_predictions(name: str, rows: Dataset) -> float:
    """The metric `name` over `rows`: of classes accuracy or matthews_correlation, of lists of tags f1, of texts bleu or
    rougeL, of a language model perplexity.

    Args:
        name: of the metric, as in `results.json` of a recipe.
        rows: of the columns above, a row for each example; for texts `prediction` and `reference`.

    Raises:
        ValueError: for a name that is none of these.
    """
    if name == "perplexity":
        columns = rows.with_format("numpy")
        return float(np.exp(columns["negative_log_likelihood"][:].sum(dtype=float) / columns["tokens"][:].sum()))
    if name not in _METRICS:
        raise ValueError(f"the metric is {name!r}; predictions tell {', '.join(_METRICS)} and perplexity.")
    references = rows["label" if "label" in rows.column_names else "reference"][:]
    return float(_METRICS[name]().compute(predictions=rows["prediction"][:], references=references)[name])
