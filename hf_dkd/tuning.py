"""Random search: what a trial draws from a space of settings."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any


def draw_settings(space: Mapping[str, Sequence[Any] | Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Settings of one trial (Bergstra and Bengio 2012), drawn one after the other in the order of `space`.

    The same seed draws the same from spaces that begin alike, so that methods with settings in common are tried at the
    same ones.

    Args:
        space: by name a sequence of values, of which each is as likely, or `{"low": …, "high": …}`, both above 0, for
            a number that is uniform on the scale of logarithms.
        seed: of the trial.

    Raises:
        ValueError: for a sequence without values, and for ends that are missing, not above 0, or the wrong way round.
    """
    source = random.Random(seed)
    settings = {}
    for name, values in space.items():
        if isinstance(values, Mapping):
            low, high = _ends(name, values)
            settings[name] = math.exp(source.uniform(math.log(low), math.log(high)))
        elif isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name} draws from {values!r}; expected values, [1.0, 2.0], or {{low: …, high: …}}.")
        else:
            settings[name] = source.choice(values)
    return settings


def _ends(name: str, values: Mapping[str, Any]) -> tuple[float, float]:
    try:
        low, high = (float(values[end]) for end in ("low", "high"))  # YAML reads 1e-3 as a string
    except (KeyError, TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name} draws from {dict(values)}; expected numbers low and high, 0 < low ≤ high.")
    return low, high
