import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_dkd import DKDArgumentsMixin, DKDSeq2SeqTrainingArguments, DKDTrainingArguments

CLASSES = [DKDTrainingArguments, DKDSeq2SeqTrainingArguments]
SETTINGS = {
    "dkd_alpha": 0.5,
    "dkd_beta": 8.0,
    "dkd_temperature": 4.0,
    "ce_weight": 0.25,
    "dkd_warmup_epochs": 20.0,
    "dkd_target": "teacher",
    "dkd_standardize": True,
    "dkd_top_k": 5,
    "dkd_top_k_beta": 2.0,
    "dkd_head": "causal_lm",
    "teacher_model_name_or_path": "models/teacher",
    "teacher_model_revision": "main",
    "teacher_model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager", "trust_remote_code": False},
    "eval_with_teacher": True,
}
BAD = [
    ("dkd_temperature", 0.0),
    ("dkd_temperature", -1.0),
    *((name, -0.5) for name in ("dkd_alpha", "dkd_beta", "ce_weight", "dkd_warmup_steps", "dkd_warmup_epochs")),
    *((name, float("nan")) for name in ("dkd_alpha", "dkd_beta", "dkd_temperature", "ce_weight", "dkd_warmup_epochs")),
    *((name, float("inf")) for name in ("dkd_alpha", "dkd_temperature", "dkd_warmup_steps")),
    ("dkd_warmup_steps", 10.5),
    ("distillation", "fitnets"),
    ("dkd_target", "student"),
    ("dkd_head", "regression"),
    *(("dkd_top_k", value) for value in (-1, 2.5, True)),
    ("dkd_top_k_beta", -1.0),
]


# ---- Two ways in ----


@pytest.mark.parametrize("arguments_class", CLASSES)
def test_the_command_line_sets_every_field(arguments_class: Any, tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path)]
    for name, value in SETTINGS.items():
        line += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    (args,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(line)
    assert {name: getattr(args, name) for name in SETTINGS} == SETTINGS
    assert args.output_dir == str(tmp_path)


@pytest.mark.parametrize("arguments_class", CLASSES)
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_file_sets_every_field(arguments_class: Any, form: str, tmp_path: Path) -> None:
    path = tmp_path / f"settings.{form}"
    path.write_text(json.dumps({**SETTINGS, "output_dir": str(tmp_path)}))  # JSON is YAML too
    parser = HfArgumentParser(arguments_class)
    (args,) = parser.parse_json_file(path) if form == "json" else parser.parse_yaml_file(path)
    assert {name: getattr(args, name) for name in SETTINGS} == SETTINGS


def test_the_command_line_offers_the_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = HfArgumentParser(DKDTrainingArguments)
    for option, value in (("--distillation", "fitnets"), ("--dkd_head", "regression")):
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), option, value])
        assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments_class", "parent"),
    [(DKDTrainingArguments, TrainingArguments), (DKDSeq2SeqTrainingArguments, Seq2SeqTrainingArguments)],
)
def test_defaults_are_the_parents_and_the_papers(arguments_class: Any, parent: Any, tmp_path: Path) -> None:
    args = arguments_class(str(tmp_path), learning_rate=0.5)
    assert isinstance(args, parent)
    assert args.output_dir == str(tmp_path)
    assert args.learning_rate == 0.5
    assert (args.ce_weight, args.dkd_alpha, args.dkd_beta, args.dkd_temperature) == (1, 1, 1, 1)
    assert (args.distillation, args.teacher_model_name_or_path, args.eval_with_teacher) == ("dkd", None, False)
    assert args.dkd_weight(1, 100, 10) == 1


# ---- Refusals ----


@pytest.mark.parametrize("arguments_class", [DKDArgumentsMixin, *CLASSES])
@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name_when_built_and_when_checked(
    arguments_class: Any, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"{name} is '?{value}'?; expected"):
        arguments_class(**{name: value})
    args = arguments_class()
    setattr(args, name, value)
    with pytest.raises(ValueError, match=rf"{name} is '?{value}'?; expected"):
        args.check_distillation()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dkd_warmup_steps": 0.1, "dkd_warmup_epochs": 2}, "dkd_warmup_steps is 0.1 and dkd_warmup_epochs is 2.0"),
        ({"distillation": "kd", "dkd_beta": 2}, 'dkd_beta is 2.0 with distillation="kd"'),
        ({"ce_weight": 0, "dkd_alpha": 0, "dkd_beta": 0}, "all 0: nothing would be trained"),
        ({"ce_weight": 0, "dkd_alpha": 0, "distillation": "kd"}, "all 0: nothing would be trained"),
        (
            {"teacher_model_init_kwargs": "{dtype"},
            "teacher_model_init_kwargs is '{dtype'; expected a JSON object: .*name",
        ),
        ({"teacher_model_init_kwargs": '["dtype"]'}, "teacher_model_init_kwargs"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DKDArgumentsMixin(**settings)


@pytest.mark.parametrize("value", [None, "abc", [1.0]])
@pytest.mark.parametrize("name", ["dkd_alpha", "dkd_temperature", "dkd_warmup_steps"])
def test_what_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))}; expected a number\."):
        DKDArgumentsMixin(**{name: value})
    args = DKDTrainingArguments()
    setattr(args, name, value)
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))}; expected a number\."):
        args.check_distillation()


@pytest.mark.parametrize(
    ("settings", "distils"),
    [
        ({}, True),
        ({"dkd_alpha": 0}, True),
        ({"dkd_beta": 0}, True),
        ({"dkd_alpha": 0, "dkd_beta": 0}, False),
        ({"distillation": "kd"}, True),
        ({"distillation": "kd", "dkd_alpha": 0}, False),
        ({"ce_weight": 0}, True),
    ],
)
def test_the_teacher_runs_where_a_term_has_weight(settings: dict[str, Any], distils: bool) -> None:
    assert DKDArgumentsMixin(**settings).distils is distils


def test_whole_numbers_become_floats_so_that_a_search_does_not_cast_its_values_to_int() -> None:
    names = ("dkd_alpha", "dkd_beta", "dkd_temperature", "ce_weight", "dkd_warmup_steps")
    args = DKDTrainingArguments(**dict.fromkeys(names, 2))
    for name in names:
        old = getattr(args, name)
        setattr(args, name, type(old)(0.75))  # as Trainer does with the values of a trial
        assert getattr(args, name) == 0.75
    args.check_distillation()


# ---- Warm-up ----


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"dkd_warmup_steps": 8}, 8), ({"dkd_warmup_steps": 0.25}, 10), ({"dkd_warmup_epochs": 2.5}, 12.5)],
)
def test_the_weight_grows_linearly_to_one(settings: dict[str, float], steps: float) -> None:
    args = DKDArgumentsMixin(**settings)
    weights = [args.dkd_weight(step, 40, 5) for step in range(1, 41)]
    assert weights == pytest.approx([min(1, step / steps) for step in range(1, 41)])
    assert weights[0] == pytest.approx(1 / steps)
    assert weights[-1] == 1


@pytest.mark.parametrize(("epochs", "held"), [(3, [1 / 3, 2 / 3, 1, 1]), (2.5, [0.4, 0.8, 1, 1])])
def test_a_staircase_holds_the_weight_within_an_epoch(epochs: float, held: list[float]) -> None:
    args = DKDArgumentsMixin(dkd_warmup_epochs=epochs, dkd_warmup_staircase=True)
    weights = [args.dkd_weight(step, 20, 5) for step in range(1, 21)]
    assert weights == pytest.approx([weight for weight in held for _ in range(5)])


def test_a_staircase_is_of_epochs() -> None:
    with pytest.raises(ValueError, match=r"dkd_warmup_steps is 8.*: give the length of the warm-up as dkd_warmup_ep"):
        DKDArgumentsMixin(dkd_warmup_steps=8, dkd_warmup_staircase=True)
    assert DKDArgumentsMixin(dkd_warmup_staircase=True).dkd_weight(1, 20, None) == 1


def test_a_share_of_all_steps_is_rounded_up() -> None:
    assert DKDArgumentsMixin(dkd_warmup_steps=0.3).dkd_weight(1, 5, None) == 0.5


def test_warm_up_in_epochs_needs_their_length() -> None:
    with pytest.raises(ValueError, match="set dkd_warmup_steps instead"):
        DKDArgumentsMixin(dkd_warmup_epochs=1).dkd_weight(1, 100, None)
    assert DKDArgumentsMixin(dkd_warmup_steps=2).dkd_weight(1, 100, None) == 0.5


# ---- Written down ----


@pytest.mark.parametrize("arguments_class", CLASSES)
def test_keywords_of_the_teacher_are_written_as_json(arguments_class: Any, tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    keywords = {"dtype": torch.bfloat16, "quantization_config": quantization, "device_map": {"": 0}}
    args = arguments_class(str(tmp_path), teacher_model_init_kwargs=keywords)
    written = json.loads(args.to_json_string())["teacher_model_init_kwargs"]
    assert written["dtype"] == "bfloat16"
    assert written["device_map"] == {"": 0}
    assert written["quantization_config"]["load_in_4bit"] is True
    assert written["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert args.teacher_model_init_kwargs["quantization_config"] is quantization
    args.to_sanitized_dict()


def test_a_path_to_the_teacher_is_written_as_json(tmp_path: Path) -> None:
    args = DKDTrainingArguments(str(tmp_path), teacher_model_name_or_path=tmp_path / "teacher")
    assert json.loads(args.to_json_string())["teacher_model_name_or_path"] == str(tmp_path / "teacher")


def test_settings_survive_being_saved(tmp_path: Path) -> None:
    args = DKDTrainingArguments(str(tmp_path), **SETTINGS)
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
    again = DKDTrainingArguments(**{n: v for n, v in json.loads(args.to_json_string()).items() if n in SETTINGS})
    assert {name: getattr(again, name) for name in SETTINGS} == SETTINGS


def test_a_token_for_the_teacher_is_not_shown_and_its_keywords_stay_as_given() -> None:
    keywords = {"token": "hf_secret", "dtype": torch.bfloat16}
    args = DKDTrainingArguments("x", teacher_model_init_kwargs=keywords)
    assert "hf_secret" not in args.to_json_string()
    assert "hf_secret" not in str(args.to_sanitized_dict())
    assert args.teacher_model_init_kwargs == {"token": "hf_secret", "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dkd_top_k": 5, "distillation": "kd"}, 'dkd_top_k is 5 with distillation="kd", which does not divide'),
        ({"dkd_top_k_beta": 2.0}, "dkd_top_k_beta is 2.0 with dkd_top_k 0: it weighs"),
        ({"dkd_top_k": 2, "dkd_top_k_beta": 2.0}, "dkd_top_k_beta is 2.0 with dkd_top_k 2.*Set dkd_top_k to 3 or more"),
    ],
)
def test_options_that_exclude_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DKDArgumentsMixin(**settings)


def test_weight_on_the_top_k_alone_distils() -> None:
    off = {"dkd_alpha": 0.0, "dkd_beta": 0.0}
    assert DKDArgumentsMixin(**off, dkd_top_k=3).distils
    assert not DKDArgumentsMixin(**off, dkd_top_k=3, dkd_top_k_beta=0.0).distils
    assert not DKDArgumentsMixin(**off, dkd_top_k=2).distils, "a group of one class has nothing within"
