"""The translation and summarisation recipe from end to end on tiny data."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from datasets import Dataset, Translation, load_dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from . import launching
from .launching import kill_after_checkpoint, launch, recipe, run_here, weights
from .lm_assets import EOS, ROMANCE, T5, WORDS, save_tiny, tiny_tokenizer, write_json

RECIPE = "seq2seq.py"
TEMPLATE = f"$A {EOS}"


def translations(count: int, seed: int) -> list[dict[str, Any]]:
    """Words that count up and their translations, of which one word in ten is wrong."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        start, length = source.randrange(10), source.randint(4, 6)
        ids = [(start + step) % 10 for step in range(length)]
        written = [source.randrange(10) if source.random() < 0.1 else index for index in ids]
        texts = {"en": " ".join(WORDS[index] for index in ids), "fr": " ".join(ROMANCE[index] for index in written)}
        rows.append({"id": len(rows), "translation": texts})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and an untrained model."""
    folder = tmp_path_factory.mktemp("seq2seq")
    write_json(folder / "train.json", translations(200, seed=0))  # 192 of them train, twelve batches of 16
    write_json(folder / "test.json", translations(29, seed=1))
    save_tiny(folder / "t5", T5ForConditionalGeneration, template=TEMPLATE, **T5)
    return folder


@pytest.fixture(scope="module")
def task(folder: Path) -> dict[str, Any]:
    files = {"train_file": folder / "train.json", "test_file": folder / "test.json"}
    languages = {"source_lang": "en", "target_lang": "fr", "source_prefix": "count : "}
    return (
        files
        | languages
        | {"validation_share": 0.04, "max_target_length": 8, "learning_rate": 1e-2, "eval_strategy": "no"}
    )


@pytest.fixture(scope="module")
def teacher(folder: Path, task: dict[str, Any]) -> Path:
    settings = {"student_model_name_or_path": folder / "t5", "num_train_epochs": 12}
    launch(RECIPE, **task, **settings, output_dir=folder / "teacher")
    return folder / "teacher"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list]]:
    predictions = load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
    return json.loads((folder / "results.json").read_text()), predictions[:]


def test_it_fine_tunes_a_teacher_that_plain_transformers_loads(teacher: Path) -> None:
    results, predictions = read(teacher)
    metrics = results["metrics"]["test"]
    pairs = list(zip(predictions["prediction"], predictions["reference"], strict=True))
    assert (results["primary_metric"], results["higher_is_better"]) == ("bleu", True)
    assert metrics["bleu"] == sacrebleu.corpus_bleu(predictions["prediction"], [predictions["reference"]]).score
    assert metrics["chrf"] == sacrebleu.corpus_chrf(predictions["prediction"], [predictions["reference"]]).score
    scores = [RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"] for text, reference in pairs]
    assert metrics["rougeL"] == pytest.approx(sum(score.fmeasure for score in scores) / len(scores))
    assert 50 < metrics["bleu"] < 99

    rows = [row["translation"] for row in translations(29, seed=1)]
    assert predictions["source"] == [f"count : {row['en']}" for row in rows]
    assert predictions["reference"] == [row["fr"] for row in rows]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    inputs = tokenizer(predictions["source"], padding=True, return_tensors="pt")
    written = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=8, do_sample=False
    )
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == predictions["prediction"]


def test_one_and_two_processes_distil_alike(folder: Path, task: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    settings = task | {"student_model_name_or_path": folder / "t5", "teacher_model_name_or_path": teacher}
    settings |= {
        "max_steps": 36,
        "generation_num_beams": 2,
        "student_config_overrides": "num_layers=1,num_decoder_layers=1",
    }
    one = run_here("seq2seq", **settings, output_dir=tmp_path / "one")["metrics"]["test"]
    halves = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4}
    two = launch(RECIPE, 2, **settings, **halves, output_dir=tmp_path / "two")["metrics"]["test"]
    for name, metrics in (("one", one), ("two", two)):
        _, predictions = read(tmp_path / name)
        assert metrics["bleu"] == sacrebleu.corpus_bleu(predictions["prediction"], [predictions["reference"]]).score
        assert predictions["reference"] == [row["translation"]["fr"] for row in translations(29, seed=1)]
        assert 0.5 < metrics["teacher_agreement"] < 1
        assert metrics["nckd"] > 0
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).config.num_layers == 1
    assert two["teacher_accuracy"] == one["teacher_accuracy"] > 0.8
    assert two["nckd"] == pytest.approx(one["nckd"], rel=1e-2)
    assert f"| teacher | `{teacher}` |" in (tmp_path / "one/README.md").read_text()


def built(**options: Any) -> tuple[Any, Any]:
    return launching.built("seq2seq", **options)


def words(trainer: Any, ids: list[int]) -> str:
    return " ".join(trainer.processing_class.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (("document", "summary"), {}),
        (("en", "fr"), {"source_lang": "en", "target_lang": "fr"}),
        (("body", "abstract"), {"source_column_name": "body", "target_column_name": "abstract"}),
    ],
)
def test_pairs_of_columns(columns: tuple[str, str], options: dict[str, str], folder: Path, tmp_path: Path) -> None:
    rows = [{columns[0]: "one two three four", columns[1]: "un deux trois quatre"}] * 4
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    trainer, splits = built(
        **options, train_file=tmp_path / "pairs.parquet", student_model_name_or_path=folder / "t5",
        max_source_length=4, max_target_length=3, source_prefix="count : ", output_dir=tmp_path / "out",
    )  # fmt: skip
    assert words(trainer, splits["train"][0]["input_ids"]) == f"count : one {EOS}"
    assert words(trainer, splits["train"][0]["labels"]) == f"un deux {EOS}"
    assert trainer.args.generation_max_length == 3
    batch = trainer.data_collator([dict(splits["train"][0]), {"input_ids": [7], "labels": [8]}])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert (batch["labels"][1] == -100).sum() == 7


def test_with_no_option_it_reads_the_translations_of_the_hub(monkeypatch: Any, tmp_path: Path) -> None:
    pairs, languages = translations(20, seed=0), Translation(["en", "fr"])
    Dataset.from_list(pairs).cast_column("translation", languages).to_parquet(tmp_path / "pairs.parquet")
    loaded, asked = load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet")), []
    monkeypatch.setattr(recipe("common").datasets, "load_dataset", lambda *name: asked.append(name) or loaded)
    data = recipe("seq2seq").PairArguments()
    splits = recipe("seq2seq").load_pairs(data)
    assert asked == [("Helsinki-NLP/opus_books", "en-fr")]
    assert data.source_prefix == "translate English to French: "
    found = sorted((row["source"], row["target"]) for split in splits.values() for row in split)
    assert found == sorted((row["translation"]["en"], row["translation"]["fr"]) for row in pairs)


def test_wrong_options_get_one_line(
    folder: Path, task: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    good = task | {"student_model_name_or_path": folder / "t5", "output_dir": tmp_path / "out"}
    T5ForConditionalGeneration.from_pretrained(folder / "t5").save_pretrained(tmp_path / "other")
    tiny_tokenizer(reversed(WORDS), TEMPLATE).save_pretrained(tmp_path / "other")
    for wrong, message in (
        (
            {"target_lang": "de"},
            "none of the columns translation.de, de; .* translation.fr: name one with --target_col",
        ),
        ({"source_column_name": "body"}, "no column 'body'; .* --source_column_name"),
        ({"train_file": tmp_path / "none.json"}, "cannot load the data set .* --train_file FILE"),
        (
            {"student_model_name_or_path": tmp_path},
            "cannot load the student tokenizer .* --student_model_name_or_path",
        ),
        ({"teacher_model_name_or_path": tmp_path / "other"}, "has another tokenizer than the student"),
    ):
        with pytest.raises(SystemExit, match=message) as stop:
            built(**good | wrong)
        assert str(stop.value).count("\n") == 0

    config = tmp_path / "options.yaml"
    config.write_text("source_language: en")
    monkeypatch.setattr(sys, "argv", [RECIPE, "--config", str(config)])
    with pytest.raises(SystemExit):
        recipe("seq2seq").main()
    assert "no option is called 'source_language'; did you mean 'source_lang'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(task: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    settings = task | {"student_model_name_or_path": teacher, "teacher_model_name_or_path": teacher, "max_steps": 60}
    settings |= {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3}
    launch(RECIPE, **settings, output_dir=tmp_path / "whole")
    kill_after_checkpoint(RECIPE, **settings, output_dir=tmp_path / "killed")
    results = launch(RECIPE, **settings, output_dir=tmp_path / "killed", resume_from_checkpoint="last")
    assert results["resumed_from"] is not None
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
