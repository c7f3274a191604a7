"""Tables of what was measured, in Markdown, and the same as JSON with the versions and the machine."""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .measure import Spread, ratios, spread

PACKAGES = "hf-dkd", "torch", "transformers", "accelerate", "trl", "liger_kernel"


class Goal(NamedTuple):
    """What the project set out to reach: `values` (one per repeat) at most `limit`, or at least."""

    what: str
    values: list[float]
    limit: float
    at_least: bool = False

    def row(self) -> list[str]:
        """What, the goal, what was measured, and whether the median reaches it."""
        middle = spread(self.values)
        met = middle.median >= self.limit if self.at_least else middle.median <= self.limit
        sign = "≥" if self.at_least else "≤"
        return [self.what, f"{sign} {self.limit:g}", ranged(middle), "yes" if met else "**no**"]


def goals_table(goals: list[Goal]) -> str:
    return table(["goal", "limit", "measured", "reached"], [goal.row() for goal in goals])


def times_table(times: dict[str, list[float]], baselines: list[str], memory: dict[str, list[str]] | None = None) -> str:
    """A row for each case: milliseconds, ratios to each of the baselines, and columns of memory (title → cells)."""
    memory = memory or {}
    rows = [
        [name, milliseconds(seconds)]
        + [ranged(spread(ratios(times, name, baseline))) for baseline in baselines]
        + [cells[index] for cells in memory.values()]
        for index, (name, seconds) in enumerate(times.items())
    ]
    return table(["", "ms", *(f"/ {baseline}" for baseline in baselines), *memory], rows)


def options(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """What every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"how often each case is timed ({repeats})")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"), help="for the table and the JSON")
    parser.add_argument("--memory", metavar="CASE", help="only print the peak memory of one case, in bytes")
    return parser


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def ranged(ratio: Spread) -> str:
    """A ratio with the range of the repeats, as in `0.51 (0.49–0.55)`."""
    median, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in ratio)
    return median if low == high else f"{median} ({low}–{high})"


def milliseconds(seconds: list[float]) -> str:
    """The median with the range of the repeats."""
    return ranged(Spread(*(1000 * value for value in spread(seconds))))


def machine() -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions | {"python": platform.python_version()},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
    }


def write(output_dir: Path, name: str, sections: dict[str, str], measured: dict[str, Any]) -> None:
    """Print `sections` (title → Markdown), and write them to `name.md`, `measured` with the machine to `name.json`."""
    facts = machine()
    packages = ", ".join(f"{package} {number}" for package, number in facts["versions"].items() if number)
    about = f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {packages}."
    text = "\n\n".join([about, *(f"### {title}\n\n{body}" for title, body in sections.items())]) + "\n"
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / f"{name}.md").write_text(text)
    (output_dir / f"{name}.json").write_text(json.dumps(facts | measured, indent=1) + "\n")
    sys.stdout.write(text)


def _cpu() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        return next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown CPU")
