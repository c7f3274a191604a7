import math
import random
from typing import Any

import numpy as np
import pytest

from hf_dkd.tuning import draw_settings

RATE = {"low": "1e-4", "high": 1e-2}  # a string, as YAML reads it


def test_spaces_that_begin_alike_are_drawn_alike() -> None:
    for seed in range(5):
        alone = draw_settings({"learning_rate": RATE}, seed)
        both = draw_settings({"learning_rate": RATE, "dkd_beta": [1.0, 2.0, 4.0]}, seed)
        assert alone["learning_rate"] == both["learning_rate"]
        source = random.Random(seed)
        assert both["learning_rate"] == pytest.approx(1e-4 * 100 ** source.random(), rel=1e-12)
        assert both["dkd_beta"] == source.choice([1.0, 2.0, 4.0])


def test_ranges_are_uniform_in_the_logarithm_and_values_equally_likely() -> None:
    draws = [draw_settings({"learning_rate": RATE, "dkd_beta": (1, 2)}, seed) for seed in range(1000)]
    logs = np.log10([draw["learning_rate"] for draw in draws])
    assert -4 <= logs.min() < -3.99
    assert -2.01 < logs.max() <= -2
    assert abs(logs.mean() + 3) < 4 * (2 / math.sqrt(12)) / math.sqrt(1000)  # four standard errors
    assert 437 < sum(draw["dkd_beta"] == 1 for draw in draws) < 563


def test_a_range_of_one_number_is_that_number() -> None:
    assert draw_settings({"x": {"low": 2, "high": 2}}, 0) == {"x": pytest.approx(2, rel=1e-15)}
    assert draw_settings({}, 0) == {}


@pytest.mark.parametrize(
    "values",
    [[], "0.1", 0.1, None, {}, {"low": 1}, {"low": 0, "high": 1}, {"low": 2, "high": 1}, {"low": "a", "high": 1},
     {"low": 1, "high": math.inf}, {"low": math.nan, "high": 1}, {"low": None, "high": 1}],
)  # fmt: skip
def test_what_cannot_be_drawn_from_is_named(values: Any) -> None:
    with pytest.raises(ValueError, match="learning_rate draws from"):
        draw_settings({"learning_rate": values}, 0)
