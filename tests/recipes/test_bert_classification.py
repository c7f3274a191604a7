"""The text classification recipe from end to end on tiny data."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from .launching import complaint, kill_after_checkpoint, launch, recipe, run_here, weights
from .text_assets import FILLERS, SUBJECTS, WORDS, save_tiny_bert, sentences

RECIPE = "bert_classification.py"


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    predictions = load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
    return json.loads((folder / "results.json").read_text()), predictions.with_format("numpy")


def test_it_fine_tunes_a_teacher_that_plain_transformers_loads(text_teacher: Path) -> None:
    results, predictions = read(text_teacher)
    assert results["metrics"]["test"]["accuracy"] == np.mean(predictions["label"][:] == predictions["prediction"][:])
    assert results["metrics"]["test"]["accuracy"] > 0.9
    assert results["settings"]["validation_share"] == 0.25

    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(text_teacher),
        AutoTokenizer.from_pretrained(text_teacher),
    )
    assert model.config.id2label == dict(enumerate(sorted(SUBJECTS)))
    texts = [row["text"] for row in sentences(60, seed=1)]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(logits.numpy(), predictions["logits"][:], atol=1e-5)


def test_it_distils_layers_of_the_teacher(text_data: dict[str, Any], text_teacher: Path, tmp_path: Path) -> None:
    settings = {
        "student_layers": "0,3",
        "teacher_model_name_or_path": text_teacher,
        "dkd_beta": 2.0,
        "num_train_epochs": 8,
    }
    results = launch(RECIPE, **text_data, **settings, output_dir=tmp_path)
    assert results["metrics"]["test"]["teacher_agreement"] > 0.7
    assert {"teacher_kl", "tckd", "nckd", "teacher_accuracy"} <= set(results["metrics"]["validation"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_hidden_layers == 2
    card = (tmp_path / "README.md").read_text()
    assert f"| teacher | `{text_teacher}` |" in card
    assert "| β | 2 |" in card


def test_a_student_with_another_tokenizer_reads_its_own_ids(
    text_data: dict[str, Any], text_teacher: Path, tmp_path: Path
) -> None:
    words = (*FILLERS[::-1], *SUBJECTS[::-1], "unused")
    assert len(words) != len(WORDS)
    student = save_tiny_bert(tmp_path / "base", BertForSequenceClassification, words, num_hidden_layers=2)
    settings = {
        "student_model_name_or_path": student,
        "teacher_model_name_or_path": text_teacher,
        "num_train_epochs": 24,
    }
    results = launch(RECIPE, **text_data, **settings, output_dir=tmp_path / "student")
    own = read(text_teacher)[0]["metrics"]["test"]["accuracy"]
    assert results["metrics"]["test"]["teacher_accuracy"] == own, "the teacher did not get its own ids"
    assert results["metrics"]["test"]["teacher_agreement"] > 0.7


def test_two_processes_train_and_evaluate(text_data: dict[str, Any], text_teacher: Path, tmp_path: Path) -> None:
    settings = {
        "student_layers": "0,3",
        "teacher_model_name_or_path": text_teacher,
        "max_steps": 3,
        "eval_strategy": "no",
    }
    one = launch(RECIPE, **text_data, **settings, output_dir=tmp_path / "one")
    two = launch(RECIPE, 2, **text_data | settings | {"per_device_train_batch_size": 8}, output_dir=tmp_path / "two")
    assert two["metrics"]["test"]["teacher_accuracy"] == one["metrics"]["test"]["teacher_accuracy"]
    for results, folder in ((one, "one"), (two, "two")):
        _, predictions = read(tmp_path / folder)
        hits = predictions["label"][:] == predictions["prediction"][:]
        assert len(hits) == 60
        assert results["metrics"]["test"]["accuracy"] == hits.mean()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(
    text_data: dict[str, Any], text_teacher: Path, tmp_path: Path
) -> None:
    settings = text_data | {"student_layers": "0,3", "teacher_model_name_or_path": text_teacher, "max_steps": 60}
    settings |= {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 4}
    launch(RECIPE, **settings, output_dir=tmp_path / "whole")
    kill_after_checkpoint(RECIPE, **settings, output_dir=tmp_path / "killed")
    results = launch(RECIPE, **settings, output_dir=tmp_path / "killed", resume_from_checkpoint="last")
    assert results["resumed_from"] is not None
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_options_come_from_a_file_and_the_command_line_wins(
    text_data: dict[str, Any], text_base: Path, tmp_path: Path
) -> None:
    config = tmp_path / "options.yaml"
    lines = [f"{name}: {value}" for name, value in text_data.items() if name != "learning_rate"]
    config.write_text("\n".join([*lines, "learning_rate: 1e-3", "max_steps: 5", "eval_strategy: 'no'"]))
    settings = {"student_model_name_or_path": text_base, "output_dir": tmp_path / "student", "max_steps": 2}
    results = launch(RECIPE, config=config, **settings)
    assert results["settings"]["learning_rate"] == 1e-3
    assert results["settings"]["max_steps"] == 2


def test_wrong_options_get_one_line(text_data: dict[str, Any], text_base: Path, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("learning_rat: 1e-3")
    good = text_data | {"student_model_name_or_path": text_base, "output_dir": tmp_path / "student"}
    assert "no option is called 'learning_rat'; did you mean 'learning_rate'?" in complaint(RECIPE, config=config)
    wrong = complaint(RECIPE, **good | {"train_file": tmp_path / "none.csv"})
    assert "cannot load the data set" in wrong
    assert "--train_file FILE" in wrong
    assert "--dataset_name FOLDER" in complaint(
        RECIPE, dataset_name="uoft-cs/none", student_model_name_or_path=text_base
    )
    wrong = complaint(RECIPE, **good, label_column_name="intent")
    assert "no column 'intent'; its columns are text, label" in wrong
    wrong = complaint(RECIPE, **good | {"student_model_name_or_path": tmp_path / "none"})
    assert "--student_model_name_or_path FOLDER" in wrong
    assert "dkd_temperature is 0.0; expected" in complaint(RECIPE, **good, dkd_temperature=0)


def test_pushing_uploads_the_student_with_its_results(
    text_data: dict[str, Any], text_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: str, **options: Any) -> Any:
            uploads.append(options | {"files": {path.name for path in Path(folder_path).iterdir() if path.is_file()}})
            finished: Future[None] = Future()
            finished.set_result(None)
            return finished

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    settings = {"teacher_model_name_or_path": text_teacher, "student_layers": "0", "max_steps": 2}
    pushed = {"push_to_hub": True, "hub_model_id": "someone/student", "output_dir": tmp_path / "out"}
    run_here("bert_classification", **text_data, **settings, **pushed)
    assert {upload["repo_id"] for upload in uploads} == {"someone/student"}
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "results.json", "predictions.parquet"}
    assert wanted <= uploads[-1]["files"]
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("## Distillation") == 1
    assert f"on the {text_data['train_file']} dataset" in card


def test_cola_is_compared_by_its_own_metric(text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"sentence": row["text"], "label": index % 2} for index, row in enumerate(sentences(16, seed=0))]
    splits = DatasetDict({name: Dataset.from_list(rows) for name in ("train", "validation")})
    monkeypatch.setattr("datasets.load_dataset", lambda *name: splits)
    options = {"student_model_name_or_path": text_base, "max_steps": 1, "output_dir": tmp_path}
    results = run_here("bert_classification", task_name="cola", **options)
    assert results["primary_metric"] == "matthews_correlation"
    assert results["primary_metric"] in results["metrics"]["validation"]


def test_a_split_that_takes_the_place_of_training_is_not_validation_too(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": index % 2} for index, row in enumerate(sentences(40, seed=0))]
    for name, first in (("validation", 0), ("test", 20)):
        Dataset.from_list(rows[first : first + 20]).to_parquet(tmp_path / f"{name}.parquet")
    common = recipe("common")
    splits = common.load_splits(common.DataArguments(dataset_name=str(tmp_path), validation_share=0.25))
    assert {name: len(split) for name, split in splits.items()} == {"train": 15, "validation": 5, "test": 20}
    assert not set(splits["train"]["text"]) & set(splits["validation"]["text"])
