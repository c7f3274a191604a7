"""The recipe that runs a teacher once, and those that train on what it wrote, each through `accelerate launch`."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from transformers import LlamaForCausalLM

import hf_dkd  # noqa: F401  # which tells `datasets` how the columns are read

from .launching import command, complaint, environment, launch, weights
from .lm_assets import LLAMA, counting, save_tiny, write_lines

RECIPE = "cache_teacher.py"


def write_cache(processes: int = 1, **options: Any) -> str:
    """Run the recipe; what it printed."""
    done = subprocess.run(
        command(RECIPE, processes, **options), env=environment(), capture_output=True, text=True, check=False
    )
    last = f"Wrote the teacher's outputs to {options['output_dir']}: train with --dataset_name {options['output_dir']}."
    assert last in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_a_classifier_trains_on_the_cache_as_with_its_teacher(
    processes: int, text_data: dict[str, Any], text_teacher: Path, text_base: Path, tmp_path: Path
) -> None:
    models = {"teacher_model_name_or_path": text_teacher, "student_model_name_or_path": text_base}
    write_cache(processes, **text_data, **models, cache_dtype="float32", output_dir=tmp_path / "cache")
    splits = load_from_disk(tmp_path / "cache")
    assert {name: len(split) for name, split in splits.items()} == {"train": 180, "validation": 60, "test": 60}

    train = {"num_train_epochs": 1, "learning_rate": 1e-3, "optim": "sgd", "per_device_train_batch_size": 16}
    live = launch("bert_classification.py", **{**text_data, **models, **train}, output_dir=tmp_path / "live")
    stored = launch(
        "bert_classification.py", **train, dataset_name=tmp_path / "cache", student_model_name_or_path=text_base,
        output_dir=tmp_path / "stored",
    )  # fmt: skip
    for name, weight in weights(tmp_path / "live").items():
        assert (weights(tmp_path / "stored")[name] - weight).abs().max() <= 1e-6, name
    for split in ("validation", "test"):
        expected = {key: value for key, value in live["metrics"][split].items() if "per_second" not in key}
        del expected["runtime"]
        assert {"teacher_agreement", "teacher_kl", "tckd", "nckd"} <= expected.keys()
        assert {key: stored["metrics"][split][key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert f"| teacher | `{text_teacher}` |" in (tmp_path / "stored/README.md").read_text()


def test_a_language_model_trains_on_the_top_logits(tmp_path: Path) -> None:
    text = write_lines(tmp_path / "text.txt", counting(60, seed=0))
    teacher = save_tiny(tmp_path / "teacher", LlamaForCausalLM, **LLAMA)
    student = save_tiny(tmp_path / "student", LlamaForCausalLM, seed=1, **LLAMA)
    printed = write_cache(
        recipe_name="causal_lm", train_file=text, block_size=16, teacher_model_name_or_path=teacher,
        dkd_temperature=2.0, student_model_name_or_path=student, top_k=4, output_dir=tmp_path / "cache",
    )  # fmt: skip
    assert "train: " in printed
    train = {"student_model_name_or_path": student, "max_steps": 3, "eval_strategy": "no"}
    results = launch(
        "causal_lm.py", dataset_name=tmp_path / "cache", dkd_temperature=2.0, **train, output_dir=tmp_path / "out"
    )
    assert {"perplexity", "tckd", "nckd", "teacher_agreement"} <= results["metrics"]["validation"].keys()
    assert 0 < results["metrics"]["validation"]["nckd"] < 5
    line = complaint(
        RECIPE, train_file=text, recipe_name="causal_lm", student_model_name_or_path=student, output_dir=tmp_path
    )
    assert "no teacher: give --teacher_model_name_or_path" in line
