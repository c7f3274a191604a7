import math

import pytest
from datasets import Dataset

from hf_dkd.metrics import metric_of_predictions


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("accuracy", {"label": [0, 1, 2, 1], "prediction": [0, 1, 1, 1]}, 0.75),
        ("matthews_correlation", {"label": [0, 1, 0, 1], "prediction": [0, 1, 0, 0]}, 1 / 3**0.5),
        ("f1", {"label": [["B-x", "O"], ["B-y"]], "prediction": [["B-x", "O"], ["B-x"]]}, 0.5),
        ("bleu", {"reference": ["a b c d e"], "prediction": ["a b c d e"]}, 100.0),
        ("rougeL", {"reference": ["a b c d"], "prediction": ["a c"]}, 2 / 3),
        ("perplexity", {"negative_log_likelihood": [6.0, 1.0], "tokens": [3.0, 1.0]}, math.exp(7 / 4)),
    ],
)
def test_every_metric_is_counted_from_its_columns(name: str, columns: dict, expected: float) -> None:
    assert metric_of_predictions(name, Dataset.from_dict(columns)) == pytest.approx(expected)


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match=r"the metric is 'loss'; predictions tell accuracy, .* rougeL and perplexity"):
        metric_of_predictions("loss", Dataset.from_dict({"label": [0], "prediction": [0]}))
