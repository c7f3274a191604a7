"""A metric by its name, counted anew from the predictions that a run saved."""

from typing import Any

import numpy as np
from datasets import Dataset

from .accuracy import Accuracy
from .entity_f1 import EntityF1
from .matthews import MatthewsCorrelation
from .rouge import Rouge
from .sacrebleu import SacreBLEU

_METRICS: dict[str, Any] = {
    "accuracy": Accuracy,
    "matthews_correlation": MatthewsCorrelation,
    "f1": EntityF1,
    "bleu": SacreBLEU,
    "rougeL": Rouge,
}


def metric_of_predictions(name: str, rows: Dataset) -> float:
    """The metric `name` over `rows`: of classes accuracy or matthews_correlation, of lists of tags f1, of texts bleu or
    rougeL, of a language model perplexity.

    Args:
        name: of the metric, as in `results.json` of a recipe.
        rows: with columns `prediction` and `label`, or `prediction` and `reference` for texts; for perplexity those
            of `TOKEN_SCORES`, a row for each example.

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
