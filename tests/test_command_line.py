import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hf_dkd import DKDTrainingArguments
from hf_dkd.command_line import parse


@dataclass
class Options:
    layers: int = 4
    rate: float = 0.5
    name: str | None = None
    fast: bool = False
    config: str | None = None

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"layers is {self.layers}; expected 0 or more.")


def parsed(monkeypatch: pytest.MonkeyPatch, *words: Any, classes: tuple[Any, ...] = (Options,)) -> tuple[Any, ...]:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    return parse(*classes)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_command_line_wins_over_the_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / f"options.{suffix}"
    config.write_text(json.dumps({"layers": 2, "rate": "1e-3", "fast": True}))
    options, changed = parsed(monkeypatch, "--config", config, "--layers", 3, "--name", "4")
    assert options == Options(layers=3, rate=0.001, name="4", fast=True, config=str(config))
    assert changed == {"layers": 3, "rate": 0.001, "name": "4", "fast": True}


def test_what_was_changed_repeats_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--layers", 1, "--output_dir", tmp_path, "--dkd_beta", 4, "--learning_rate", 1e-3, "--use_cpu", True)
    both = (Options, DKDTrainingArguments)
    options, args, changed = parsed(monkeypatch, *words, classes=both)
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(changed))
    again, args_again, changed_again = parsed(monkeypatch, "--config", config, classes=both)
    assert (again.layers, args_again.to_dict(), changed_again) == (options.layers, args.to_dict(), changed)
    assert (args.dkd_beta, args.learning_rate) == (4, 1e-3)


def test_a_file_may_call_an_option_by_its_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class WithAlias(Options):
        rate: float = field(default=0.5, metadata={"aliases": ["--speed"]})

    config = tmp_path / "options.yaml"
    config.write_text("speed: 2")
    options, changed = parsed(monkeypatch, "--config", config, classes=(WithAlias,))
    assert (options.rate, changed) == (2.0, {"rate": 2.0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layer: 3", "no option is called 'layer'; did you mean 'layers'?"),
        ("xyz: 3", "no option is called 'xyz'\n"),
        ("- layers", "holds a list; expected options and their values"),
        ("layers: [", "cannot read --config"),
        (None, "cannot read --config"),
        ("layers: many", "argument --layers: invalid int value: 'many'"),
        ("layers: -1", "layers is -1; expected 0 or more."),
    ],
)
def test_a_file_that_does_not_fit_gets_one_line(
    content: str | None, message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    config = tmp_path / "options.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, "--config", config)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert message in lines[-1]
    assert sum("error:" in line for line in lines) == 1
