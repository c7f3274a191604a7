"""The options of a script: from the command line, and from a YAML or JSON file that it names with `--config`."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


def parse(*dataclasses: Any) -> tuple[Any, ...]:
    """Fill dataclasses of options, as `HfArgumentParser` does, from `sys.argv` and the file of its option `--config`.

    The command line wins over the file. Whatever is wrong ends the script with a usage line and one that says why.

    Args:
        dataclasses: the classes, one of which has a field `config`, the path of the file, None by default.

    Returns:
        An instance of each, then a dict of the options that are not at their default, which repeat the run as a file.

    Raises:
        SystemExit: for options that do not exist, values that do not fit, and a file that cannot be read.
    """
    parser = HfArgumentParser(dataclasses, usage="%(prog)s [--config FILE] [--OPTION VALUE …]; --help lists them")
    defaults = vars(parser.parse_args([]))
    config = parser.parse_known_args()[0].config
    if config is not None:
        aliases = {name.lstrip("-"): action.dest for action in parser._actions for name in action.option_strings}
        parser.set_defaults(**_read_config(config, defaults, aliases, parser.error))
    values = vars(parser.parse_args())
    try:
        filled = parser.parse_dict(dict(values))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    changed = {name: value for name, value in values.items() if value != defaults[name] and name != "config"}
    return (*filled, changed)


def _read_config(
    path: str, known: dict[str, Any], aliases: dict[str, str], error: Callable[[str], NoReturn]
) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as problem:
        error(f"cannot read --config {path}: {' '.join(str(problem).split())}")
    if not isinstance(content, dict):
        error(f"--config {path} holds a {type(content).__name__}; expected options and their values")
    content = {aliases.get(name, name): value for name, value in content.items()}
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            error(f"--config {path}: no option is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    # As strings the command line's own types apply: YAML reads 1e-3 as a string, and 5 where a float is meant.
    plain = (str, int, float, bool)
    return {name: str(value) if isinstance(value, plain) else value for name, value in content.items()}
