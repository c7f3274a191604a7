"""The recipe for tagging words from end to end on tiny data: names of people and places, some of several subwords."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from seqeval.metrics import f1_score, precision_score, recall_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertForTokenClassification

from .launching import built, complaint, kill_after_checkpoint, launch, recipe, weights
from .text_assets import FILLERS, save_tiny_bert

RECIPE = "bert_token_classification.py"
FIRST_NAMES, LAST_NAMES, PLACES = ("ann", "bobby"), ("smith", "nilsson"), ("rome", "paris")
SUBWORDS = (*FILLERS, "ann", "bob", "##by", "smith", "nils", "##son", "rome", "par", "##is")
TAGS = ["B-location", "B-person", "I-person", "O"]


def texts(count: int, seed: int) -> list[dict[str, list[str]]]:
    """Random sentences with a person, of one name or two, and mostly a place; all of them lists of words and tags."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        person = [(source.choice(FIRST_NAMES), "B-person")]
        if source.random() < 0.5:
            person.append((source.choice(LAST_NAMES), "I-person"))
        place = [(source.choice(PLACES), "B-location")] if source.random() < 0.7 else []
        others = [(word, "O") for word in source.choices(FILLERS, k=source.randint(2, 5))]
        cut = source.randrange(len(others))
        words = person + others[:cut] + place + others[cut:]
        rows.append({"tokens": [word for word, _ in words], "ner_tags": [tag for _, tag in words]})
    return rows


TEST = texts(41, seed=1)


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for a training and a test file, without a validation split."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "train_file": write_json(folder / "train.json", texts(240, seed=0)),
        "test_file": write_json(folder / "test.json", TEST),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "eval_strategy": "no",
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("base"), BertForTokenClassification, SUBWORDS)


@pytest.fixture(scope="module")
def teacher(data: dict[str, Any], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher")
    launch(RECIPE, **data, student_model_name_or_path=base, output_dir=output, num_train_epochs=20)
    return output


def read(folder: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """The metrics on the test split, recomputed from the predictions, and these."""
    table = load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
    tags, predictions = list(table["label"]), list(table["prediction"])
    assert tags == [row["ner_tags"] for row in TEST]
    metrics = json.loads((folder / "results.json").read_text())["metrics"]["test"]
    expected = {"accuracy": agreement(predictions, tags)} | {
        name: score(tags, predictions, zero_division=0)
        for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score))
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    return metrics, predictions


def agreement(tags: list[list[str]], others: list[list[str]]) -> float:
    """The share of words that two lists of predictions tag alike."""
    return float(np.mean([a == b for row in zip(tags, others, strict=True) for a, b in zip(*row, strict=True)]))


def tags_by(folder: Path) -> list[list[str]]:
    """What the model saved in `folder` says of the test texts, loaded and run by transformers alone."""
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tags = []
    for row in TEST:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            classes = model(**encoded).logits[0].argmax(-1)
        first = [encoded.word_ids().index(word) for word in range(len(row["tokens"]))]
        tags.append([model.config.id2label[int(classes[position])] for position in first])
    return tags


def test_it_fine_tunes_a_teacher_that_plain_transformers_loads(teacher: Path) -> None:
    metrics, predictions = read(teacher)
    assert metrics["f1"] > 0.9
    assert AutoModelForTokenClassification.from_pretrained(teacher).config.id2label == dict(enumerate(TAGS))
    assert tags_by(teacher) == predictions


def test_it_distils_layers_of_the_teacher(data: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    settings = {"student_layers": "0,3", "teacher_model_name_or_path": teacher, "dkd_beta": 2.0, "num_train_epochs": 4}
    results = launch(RECIPE, **data, **settings, output_dir=tmp_path)
    assert results["primary_metric"] == "f1"
    metrics, predictions = read(tmp_path)
    own, of_teacher = read(teacher)
    assert metrics["f1"] > 0.7
    assert metrics["teacher_accuracy"] == pytest.approx(own["accuracy"], rel=1e-6)
    assert metrics["teacher_agreement"] == pytest.approx(agreement(predictions, of_teacher), rel=1e-6)
    assert metrics["teacher_kl"] > 0
    assert {"tckd", "nckd"} <= results["metrics"]["validation"].keys()
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.num_hidden_layers == 2
    assert tags_by(tmp_path) == predictions
    assert f"| teacher | `{teacher}` |" in (tmp_path / "README.md").read_text()


def test_two_processes_train_and_evaluate_on_numbered_tags(data: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    names = TAGS[::-1]  # another order than the teacher's
    for split, rows in (("train", texts(240, seed=0)), ("test", TEST)):
        numbered = [row | {"ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in rows]
        Dataset.from_list(numbered).to_parquet(tmp_path / f"{split}.parquet")
    settings = data | {"train_file": None, "test_file": None, "dataset_name": tmp_path, "tag_names": ",".join(names)}
    settings |= {"student_layers": "0,3", "teacher_model_name_or_path": teacher, "max_steps": 5}
    launch(RECIPE, 2, **settings | {"per_device_train_batch_size": 8}, output_dir=tmp_path / "student")
    metrics, predictions = read(tmp_path / "student")
    own, of_teacher = read(teacher)
    assert metrics["teacher_accuracy"] == pytest.approx(own["accuracy"], rel=1e-6)
    assert metrics["teacher_agreement"] == pytest.approx(agreement(predictions, of_teacher), rel=1e-6)
    assert metrics["teacher_agreement"] < 1, "train for fewer steps"
    assert tags_by(tmp_path / "student") == predictions


def test_all_subwords_are_labelled_for_training_alone(data: dict[str, Any], base: Path, tmp_path: Path) -> None:
    settings = data | {"student_model_name_or_path": base, "output_dir": tmp_path, "label_all_subwords": True}
    trainer, splits = built("bert_token_classification", **settings)
    ids = trainer.processing_class.convert_tokens_to_ids(["bob", "##by", "nils", "##son", "rome"])
    labels = {"train": ["B-person", "I-person", "I-person", "I-person", "B-location"]}
    labels["test"] = ["B-person", None, "I-person", None, "B-location"]
    for split, expected in labels.items():
        found: dict[int, set[int]] = {}
        for row in splits[split]:
            for token, label in zip(row["input_ids"], row["labels"], strict=True):
                found.setdefault(token, set()).add(label)
        assert [found[token] for token in ids] == [{-100 if tag is None else TAGS.index(tag)} for tag in expected]


def test_the_seed_decides_the_weights_of_a_new_head(data: dict[str, Any], base: Path, tmp_path: Path) -> None:
    settings = data | {"student_model_name_or_path": base, "output_dir": tmp_path}
    heads = [built("bert_token_classification", **settings, seed=seed)[0].model.classifier.weight for seed in (3, 3, 4)]
    assert heads[0].shape[0] == len(TAGS)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(data: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    settings = data | {"student_layers": "0,3", "teacher_model_name_or_path": teacher, "max_steps": 60}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    launch(RECIPE, **settings, output_dir=tmp_path / "whole")
    kill_after_checkpoint(RECIPE, **settings, output_dir=tmp_path / "killed")
    results = launch(RECIPE, **settings, output_dir=tmp_path / "killed", resume_from_checkpoint="last")
    assert results["resumed_from"] is not None
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_wrong_options_get_one_line(
    data: dict[str, Any],
    base: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = save_tiny_bert(tmp_path / "other", BertForTokenClassification, SUBWORDS[::-1])
    wrong = complaint(RECIPE, **data, student_model_name_or_path=other, teacher_model_name_or_path=teacher)
    assert "the tokenizers of teacher (29 subwords) and student (29) differ" in wrong
    assert "--student_layers" in wrong

    def stops(message: str, row: dict[str, Any] | None = None, **options: Any) -> None:
        if row is not None:
            options["train_file"] = write_json(tmp_path / "wrong.json", [row] * 20)
        good = {"student_model_name_or_path": base, "output_dir": tmp_path / "student"}
        with pytest.raises(SystemExit, match=message) as stop:
            built("bert_token_classification", **good | options)
        assert "\n" not in str(stop.value)

    stops("cannot load the data set 'lhoestq/conll2003'.* --train_file FILE")
    stops("cannot load the data set .*none.json", train_file=tmp_path / "none.json")
    stops("--student_model_name_or_path FOLDER", **data | {"student_model_name_or_path": tmp_path / "none"})
    stops("no column 'pos_tags'; its columns are tokens, ner_tags", **data, tags_column_name="pos_tags")
    stops("the tokens are no lists", {"tokens": "ann", "ner_tags": ["O"]})
    stops("the tags are numbers: name them with --tag_names", {"tokens": ["ann"], "ner_tags": [1]})
    stops(r"1 words have the tags \[1\].* from 0 to 0", {"tokens": ["ann"], "ner_tags": [1]}, tag_names="O")
    stops(r"2 words have the tags \[0\]", {"tokens": ["ann", "smith"], "ner_tags": ["O"]})
    unknown = write_json(tmp_path / "unknown.json", [{"tokens": ["ann"], "ner_tags": ["B-animal"]}])
    stops("Invalid string class label B-animal; the training split", **data | {"test_file": unknown})

    config = tmp_path / "options.yaml"
    config.write_text("label_all_subword: true")
    monkeypatch.setattr(sys, "argv", [RECIPE, "--config", str(config)])
    with pytest.raises(SystemExit):
        recipe("bert_token_classification").main()
    assert "did you mean 'label_all_subwords'?" in capsys.readouterr().err


def test_with_no_option_it_distils_hub_models(monkeypatch: Any, tmp_path: Path) -> None:
    """As far as the network: the ids that are asked for, and the line that says that they cannot be had."""
    asked: list[Any] = []

    def load_dataset(*name: Any) -> DatasetDict:
        asked.append(name)
        return DatasetDict(train=Dataset.from_dict({"tokens": [["a", "b"]] * 20, "ner_tags": [[0, 1]] * 20}))

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append(name)
        if len(asked) == 3:
            raise OSError("offline")
        return None

    common = recipe("common")
    monkeypatch.setattr(common.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(SystemExit, match=r"teacher tokenizer 'dslim.*offline; .* --teacher_model_name_or_path FOLDER"):
        built("bert_token_classification", output_dir=tmp_path)
    assert asked == [("lhoestq/conll2003", None), "distilbert/distilbert-base-cased", "dslim/bert-base-NER"]
