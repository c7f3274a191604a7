import math

import numpy as np
import pytest
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from hf_dkd.metrics import class_columns, metric_of_predictions, score_columns, tag_columns


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


def test_columns_of_a_classifier_tell_its_accuracy() -> None:
    logits, labels = np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]]), np.array([1, 1, 1])
    columns = class_columns(PredictionOutput(logits, labels, {}))
    assert [list(columns[name]) for name in ("label", "prediction")] == [[1, 1, 1], [1, 0, 1]]
    assert columns["logits"] is logits
    assert metric_of_predictions("accuracy", Dataset.from_dict(columns)) == pytest.approx(2 / 3)


def test_columns_of_a_tagger_are_lists_of_tags() -> None:
    labels = np.array([[-100, 1, 0], [2, -100, -100]])
    logits = np.eye(3)[[[0, 1, 2], [2, 1, 1]]]
    columns = tag_columns(["O", "B-x", "B-y"], PredictionOutput(logits, labels, {}))
    assert columns == {"label": [["B-x", "O"], ["B-y"]], "prediction": [["B-x", "B-y"], ["B-y"]]}


def test_columns_of_a_language_model_tell_its_perplexity() -> None:
    scores = np.array([[6.0, 3, 1], [1.0, 1, 0]], dtype=np.float32)
    columns = score_columns(PredictionOutput(scores, None, {}))
    assert {name: list(values) for name, values in columns.items()} == {
        "negative_log_likelihood": [6.0, 1.0],
        "tokens": [3.0, 1.0],
        "hits": [1.0, 0.0],
    }
    assert metric_of_predictions("perplexity", Dataset.from_dict(columns)) == pytest.approx(math.exp(7 / 4))
