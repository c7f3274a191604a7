from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hf_dkd import DKDArgumentsMixin
from hf_dkd.reporting import add_to_model_card, distillation_section, plot_curves, summarise_runs, summary_table

TERMS = {"loss": 1.25, "ce": 0.5, "tckd": 0.03125, "nckd": 0.123456, "dkd": 0.75, "teacher_agreement": 0.875}
HISTORY = [
    {"step": 10, **dict.fromkeys(TERMS, 9.0)},
    {"step": 20, **TERMS, "dkd_weight": 1.0},
    {"step": 20, "eval_loss": 0.4},
    {"step": 20, "train_loss": 3.0, "train_runtime": 1.0},
]


def table(section: str) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert cells[:2] == [["setting", "value"], ["---", "---"]]
    return dict(cells[2:])


def test_the_section_names_teacher_settings_and_final_terms() -> None:
    settings = DKDArgumentsMixin(dkd_alpha=0.5, dkd_beta=8, dkd_temperature=4, ce_weight=0.25, dkd_warmup_epochs=20)
    section = distillation_section("models/teacher", settings, HISTORY)
    assert "decoupled knowledge distillation" in section
    assert "2203.08679" in section
    assert table(section) == {
        "teacher": "`models/teacher`",
        "α": "0.5",
        "β": "8",
        "T": "4",
        "CE weight": "0.25",
        "warm-up": "20 epochs",
        "final training loss": "1.25",
        "final CE, the hard-label loss": "0.5",
        "final TCKD": "0.03125",
        "final NCKD": "0.1235",
        "final weighted distillation term": "0.75",
        "final agreement with the teacher": "0.875",
    }


def test_classical_distillation_has_no_beta() -> None:
    section = distillation_section("teacher", DKDArgumentsMixin(distillation="kd", dkd_alpha=2), HISTORY)
    assert "classical knowledge distillation" in section
    assert "β" not in table(section)
    assert table(section)["α"] == "2"


def test_options_that_are_off_are_not_told() -> None:
    options: dict[str, Any] = {"dkd_top_k": 5, "dkd_standardize": True, "dkd_target": "teacher"}
    rows = table(distillation_section("teacher", DKDArgumentsMixin(**options), HISTORY))
    assert (rows["top k"], rows["logits"]) == ("5, β 1 among them", "standardised")
    assert rows["target without a label"] == "the teacher's class"
    assert (
        not {"top k", "logits", "target without a label"}
        & table(distillation_section("teacher", DKDArgumentsMixin(), HISTORY)).keys()
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "0 steps"),
        ({"dkd_warmup_steps": 100}, "100 steps"),
        ({"dkd_warmup_steps": 0.05}, "5% of all steps"),
        ({"dkd_warmup_steps": 0.005}, "0.5% of all steps"),
        ({"dkd_warmup_epochs": 1.5}, "1.5 epochs"),
        ({"dkd_warmup_epochs": 20, "dkd_warmup_staircase": True}, "20 epochs, held within an epoch"),
    ],
)
def test_warm_up_is_told_as_it_was_set(settings: dict[str, Any], expected: str) -> None:
    assert table(distillation_section("teacher", DKDArgumentsMixin(**settings), HISTORY))["warm-up"] == expected


def test_a_run_that_logged_nothing_still_names_its_settings() -> None:
    rows = table(distillation_section("teacher", DKDArgumentsMixin(), []))
    assert list(rows) == ["teacher", "α", "β", "T", "CE weight", "warm-up"]


def test_the_section_is_appended_to_the_card(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# A student\n", encoding="utf-8")
    add_to_model_card(tmp_path, "teacher", DKDArgumentsMixin(), HISTORY)
    text = card.read_text(encoding="utf-8")
    assert text.startswith("# A student\n\n## Distillation\n")
    assert text.endswith(distillation_section("teacher", DKDArgumentsMixin(), HISTORY))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_of_runs_with_and_without_a_teacher_are_drawn(suffix: str, tmp_path: Path) -> None:
    runs = [[{"step": step, **TERMS} for step in (1, 2, 3)] for _ in range(2)]
    alone = [[{"step": step, "ce": 0.5, "loss": 0.5} for step in (1, 2, 3)]]
    plot_curves({"DKD": runs, "CE": alone}, tmp_path / f"curves.{suffix}")
    assert (tmp_path / f"curves.{suffix}").stat().st_size > 10_000


def test_each_panel_draws_the_methods_that_have_its_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    runs = [[{"step": step, **TERMS, "tckd": height * step} for step in (1, 2, 3)] for height in (0.5, 1.5)]
    alone = [[{"step": step, "ce": 0.25, "loss": 0.25} for step in (1, 2)] + [{"step": 2, "eval_loss": 0.5}]]
    plot_curves({"DKD": runs, "CE": alone}, tmp_path / "curves.png")
    ce, tckd, nckd = drawn[0].axes
    assert [axes.get_title() for axes in (ce, tckd, nckd)] == [
        "CE (hard labels)",
        "TCKD (target against the rest)",
        "NCKD (among the rest)",
    ]
    assert [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (ce, tckd, nckd)] == [
        ["DKD", "CE"],
        ["DKD"],
        ["DKD"],
    ]
    # Two runs and their mean; of the method without a teacher one run and its mean, in its own colour.
    curves = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in (ce, tckd, nckd)]
    assert curves[0] == [[0.5] * 3] * 3 + [[0.25] * 2] * 2
    assert curves[1] == [[0.5, 1.0, 1.5], [1.5, 3.0, 4.5], [1.0, 2.0, 3.0]]
    assert curves[2] == [[TERMS["nckd"]] * 3] * 3
    assert [line.get_color() for line in ce.get_lines()] == ["C0"] * 3 + ["C1"] * 2
    assert list(tckd.get_lines()[0].get_xdata()) == [1, 2, 3]


RUNS = [
    {"parameters": 5018, "seconds": 1.0, "eval_accuracy": 0.9, "eval_loss": 0.4},
    {"parameters": 5018, "seconds": 2.0, "eval_accuracy": 0.94, "eval_loss": 0.2},
]
TITLES = {"accuracy": "test accuracy %", "teacher_agreement": "agreement %"}


def test_runs_come_to_means_and_spreads() -> None:
    row = summarise_runs(RUNS, TITLES)
    spread = pytest.approx(4 / 2**0.5)
    assert row == {"parameters": 5018, "seconds": 1.5, "accuracy": pytest.approx(92), "accuracy_spread": spread}
    taught = summarise_runs([RUNS[0] | {"eval_teacher_agreement": 0.5}], TITLES)
    assert taught == {"parameters": 5018, "seconds": 1.0, "accuracy": 90, "teacher_agreement": 50}
    with pytest.raises(ValueError, match="no runs to summarise"):
        summarise_runs([], TITLES)


def test_the_summary_has_a_column_for_each_metric() -> None:
    rows = {"teacher": {"parameters": 136138, "seconds": 4.54, "accuracy": 96.768}, "DKD": summarise_runs(RUNS, TITLES)}
    assert summary_table(rows, TITLES).splitlines() == [
        "                test accuracy %    agreement %  parameters  seconds",
        "teacher                   96.77                    136,138      4.5",
        "DKD                92.00 ± 2.83                      5,018      1.5",
    ]
    assert summary_table(rows, {}).splitlines()[1] == "teacher            136,138      4.5"
