"""The causal language model recipe from end to end on tiny data, and its adapter form."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

from . import launching
from .launching import kill_after_checkpoint, launch, recipe, run_here, weights
from .lm_assets import LLAMA, WORDS, counting, save_tiny, tiny_tokenizer, words_of, write_json, write_lines

RECIPE = "causal_lm.py"
BLOCK = 32
LINES = counting(400, seed=0)
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.1}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
LORA = {"lora_r": 4, "lora_alpha": 8}


def task(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts that name a number, completions that count on from it; of several lengths."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        start, length = source.randrange(10), source.randint(2, 6)
        rest = " ".join(WORDS[(start + step) % 10] for step in range(1, length))
        rows.append({"prompt": f"count : {WORDS[start]} ", "completion": rest})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and untrained models."""
    folder = tmp_path_factory.mktemp("causal_lm")
    write_lines(folder / "text.txt", LINES)
    write_json(folder / "task.json", task(98, seed=0))  # 88 of them train, eleven batches of 8
    write_json(folder / "task_test.json", task(21, seed=1))
    save_tiny(folder / "llama", LlamaForCausalLM, **LLAMA)
    save_tiny(folder / "gpt2", GPT2LMHeadModel, seed=1, **GPT2)
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> dict[str, Any]:
    return {"train_file": folder / "text.txt", "block_size": BLOCK, "learning_rate": 3e-3, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def prompts(folder: Path) -> dict[str, Any]:
    files = {"train_file": folder / "task.json", "test_file": folder / "task_test.json"}
    return files | {"learning_rate": 3e-3, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def teacher(folder: Path, text: dict[str, Any]) -> Path:
    launch(
        RECIPE, **text, student_model_name_or_path=folder / "llama", output_dir=folder / "teacher", num_train_epochs=6
    )
    return folder / "teacher"


@pytest.fixture(scope="module")
def counts_from_prompts(prompts: dict[str, Any], teacher: Path) -> dict[str, Any]:
    """Options for an adapter of the teacher that its base teaches a little while it learns to count from a prompt."""
    settings = prompts | LORA | {"student_model_name_or_path": teacher, "teacher_adapter": "base", "lora_dropout": 0.0}
    return settings | {"dkd_alpha": 0.1, "dkd_beta": 0.1, "max_steps": 40}


@pytest.fixture(scope="module")
def adapter(folder: Path, counts_from_prompts: dict[str, Any]) -> Path:
    """That adapter, trained by two processes."""
    halves = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    launch(RECIPE, 2, **counts_from_prompts, **halves, output_dir=folder / "adapter")
    return folder / "adapter"


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    predictions = load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
    return json.loads((folder / "results.json").read_text()), predictions.with_format("numpy")


def perplexity(predictions: Any) -> float:
    return float(
        np.exp(np.sum(predictions["negative_log_likelihood"][:], dtype=float) / predictions["tokens"][:].sum())
    )


def losses_by_hand(model: Any, ids: list[int], first: int = 1) -> float:
    """The summed negative log-likelihood of the tokens from `first` on."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return float(cross_entropy(logits[first - 1 :], torch.tensor(ids[first:]), reduction="sum"))


def test_it_fine_tunes_a_teacher_that_plain_transformers_loads(teacher: Path) -> None:
    results, predictions = read(teacher)
    metrics = results["metrics"]["validation"]
    assert (results["primary_metric"], results["higher_is_better"]) == ("perplexity", False)
    assert metrics["perplexity"] == pytest.approx(perplexity(predictions), rel=1e-6)
    assert metrics["token_accuracy"] == predictions["hits"][:].sum() / predictions["tokens"][:].sum()
    assert 1.5 < metrics["perplexity"] < 3.2  # 27 tokens untrained; no model can know the word drawn at random

    # The last tenth of the file, with its line breaks, in blocks of which the first token alone is not predicted.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    held_out = tokenizer("".join(f"{line}\n" for line in LINES[-40:])).input_ids
    blocks = [held_out[first : first + BLOCK] for first in range(0, len(held_out) - 1, BLOCK)]
    assert predictions["tokens"][:].tolist() == [len(block) - 1 for block in blocks]
    by_hand = [losses_by_hand(model, block) for block in blocks]
    np.testing.assert_allclose(predictions["negative_log_likelihood"][:], by_hand, rtol=1e-4)


def test_it_distils_into_another_architecture(
    folder: Path, text: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    settings = text | {"student_model_name_or_path": folder / "gpt2", "teacher_model_name_or_path": teacher}
    settings |= {"max_steps": 40, "learning_rate": 1e-2, "max_eval_samples": 23}
    metrics = run_here("causal_lm", **settings, output_dir=tmp_path)["metrics"]["validation"]
    _, predictions = read(tmp_path)
    assert metrics["perplexity"] == pytest.approx(perplexity(predictions), rel=1e-6)
    assert predictions["tokens"][:].sum() == sum(len(line.split()) + 1 for line in LINES[-40:-17]) - len(predictions)
    assert metrics["teacher_agreement"] > 0.75
    assert metrics["teacher_accuracy"] > 0.7
    assert {"tckd", "nckd"} <= set(metrics)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config.n_layer == 2
    assert f"| teacher | `{teacher}` |" in (tmp_path / "README.md").read_text()


def test_an_adapter_learns_from_its_own_base(prompts: dict[str, Any], teacher: Path, adapter: Path) -> None:
    results, predictions = read(adapter)
    metrics = results["metrics"]["test"]
    assert metrics["perplexity"] == pytest.approx(perplexity(predictions), rel=1e-6)
    rows = task(21, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(teacher)
    by_hand = {"student": [], "base": []}
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids
        by_hand["student"].append(losses_by_hand(model, ids, first=3))
        by_hand["base"].append(losses_by_hand(base, ids, first=3))
    assert predictions["tokens"][:].tolist() == [len(row["completion"].split()) + 1 for row in rows]
    np.testing.assert_allclose(predictions["negative_log_likelihood"][:], by_hand["student"], rtol=1e-4)
    assert sum(by_hand["student"]) < 0.7 * sum(by_hand["base"])
    assert 0 < metrics["teacher_agreement"] < 1
    assert metrics["teacher_accuracy"] < metrics["token_accuracy"]


def test_one_and_two_processes_train_the_same_adapter(
    counts_from_prompts: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    two = read(adapter)[0]["metrics"]["test"]
    one = run_here("causal_lm", **counts_from_prompts, output_dir=tmp_path)["metrics"]["test"]
    assert two["teacher_accuracy"] == one["teacher_accuracy"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert two["nckd"] == pytest.approx(one["nckd"], rel=1e-2)


def test_only_the_adapter_is_saved(teacher: Path, adapter: Path) -> None:
    saved = {path.relative_to(adapter).name for path in adapter.rglob("*.safetensors")}
    assert saved == {"adapter_model.safetensors"}
    assert all(".lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(teacher)
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"| teacher | `{teacher} with adapters off` |" in card


def built(**options: Any) -> tuple[Any, Any]:
    return launching.built("causal_lm", **options)


def test_another_adapter_teaches_without_a_second_copy(
    prompts: dict[str, Any], teacher: Path, adapter: Path, tmp_path: Path
) -> None:
    settings = prompts | LORA | {"student_model_name_or_path": teacher, "teacher_adapter": adapter, "max_steps": 3}
    trainer, _ = built(**settings, lora_dropout=0.2, output_dir=tmp_path)
    model = trainer.model
    base = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(teacher).parameters())
    one = sum(weight.numel() for weight in load_file(adapter / "adapter_model.safetensors").values())
    assert trainer.teacher.model is model
    assert sum(parameter.numel() for parameter in model.parameters()) == base + 2 * one
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".default." in name
    }

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dropout = {name: [] for name in ("default", "teacher")}
    for name, module in model.named_modules():
        adapter_name = name.rsplit(".", 1)[-1]
        if "lora_dropout." in name:
            module.register_forward_hook(lambda module, *_, seen=dropout[adapter_name]: seen.append(module.training))
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".default." in name}
    assert set(dropout["default"]) == {True}, "the student's dropout was off in training"
    assert set(dropout["teacher"]) == {False}, "the teacher's dropout was on"
    assert trainer.state.log_history[0]["nckd"] > 0

    trainer.save_model()
    assert [path.name for path in tmp_path.rglob("adapter_model.safetensors")] != []
    assert not (tmp_path / "teacher").exists(), "the teacher's adapter was saved with the student"
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_student_of_some_layers(text: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    trainer, _ = built(**text, teacher_model_name_or_path=teacher, student_layers="0,2", output_dir=tmp_path)
    own, whole = trainer.model.state_dict(), AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    assert trainer.model.config.num_hidden_layers == 2
    weight = "mlp.down_proj.weight"
    assert torch.equal(own[f"model.layers.1.{weight}"], whole[f"model.layers.2.{weight}"])


def test_weights_of_half_precision_train_in_single(text: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    trainer, _ = built(**text, student_model_name_or_path=tmp_path / "half", output_dir=tmp_path / "student")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ({"text": ["one two", "three"]}, {"block_size": 2}, [("one two",) * 2, ("</s> three",) * 2]),
        ({"text": ["one two", "three"]}, {"packing": False}, [("one two </s>",) * 2, ("three </s>",) * 2]),
        ({"prompt": ["one"], "completion": ["two three"]}, {"block_size": 3}, [("two three </s>",) * 2]),
        ({"prompt": ["one"], "completion": ["two three"]}, {}, [("one two three </s>", ". two three </s>")]),
    ],
)
def test_texts_are_packed_and_prompts_masked(rows: Any, options: Any, expected: list[tuple[str, str]]) -> None:
    causal_lm, tokenizer = recipe("causal_lm"), tiny_tokenizer()
    examples = causal_lm.encode(rows, tokenizer, causal_lm.CorpusArguments(**options), ending="</s>")
    pairs = zip(examples["input_ids"], examples["labels"], strict=True)
    assert [(words_of(ids, tokenizer), words_of(labels, tokenizer)) for ids, labels in pairs] == expected


def test_with_no_option_it_distils_hub_models(monkeypatch: Any, tmp_path: Path) -> None:
    """As far as the network: the ids that are asked for, and the line that says that they cannot be had."""
    asked = []

    def load_dataset(*name: Any) -> DatasetDict:
        asked.append(name)
        return DatasetDict(train=Dataset.from_dict({"text": LINES}))

    def from_pretrained(name: str) -> Any:
        asked.append(name)
        if len(asked) == 3:
            raise OSError("offline")
        return tiny_tokenizer()

    common = recipe("common")
    monkeypatch.setattr(common.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(
        SystemExit, match=r"teacher tokenizer 'Hugging.*offline; .* --teacher_model_name_or_path FOLDER"
    ):
        built(output_dir=tmp_path)
    models = ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1"), *models]


def test_wrong_options_get_one_line(
    folder: Path, text: dict[str, Any], teacher: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    good = text | {"student_model_name_or_path": folder / "llama", "output_dir": tmp_path / "out"}
    other = tiny_tokenizer(reversed(WORDS))
    LlamaForCausalLM.from_pretrained(folder / "llama").save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    for wrong, message in (
        ({"text_column_name": "body"}, "no column 'body'; its columns are text: name one with --text_column_name"),
        ({"completion_column_name": "text"}, "none of the columns prompt; .* --prompt_column_name"),
        ({"train_file": tmp_path / "none.txt"}, "cannot load the data set .* --train_file FILE"),
        ({"student_model_name_or_path": tmp_path}, "cannot load the student tokenizer .* --student_model_name_or_path"),
        ({"teacher_model_name_or_path": tmp_path / "other"}, "has another tokenizer than the student"),
        ({"teacher_adapter": "base"}, "give --lora_r, no --teacher_model_name_or_path"),
        (LORA | {"student_layers": "0"}, "--lora_r saves an adapter without its base"),
        (LORA | {"teacher_adapter": tmp_path}, f"--teacher_adapter {tmp_path}: Can't find 'adapter_config"),
        (LORA | {"lora_target_modules": "query"}, r"--lora_target_modules query .*Target modules .* not found"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=message) as stop:
            built(**good | wrong)
        assert str(stop.value).count("\n") == 0

    config = tmp_path / "options.yaml"
    config.write_text("blok_size: 8")
    monkeypatch.setattr(sys, "argv", [RECIPE, "--config", str(config)])
    with pytest.raises(SystemExit):
        recipe("causal_lm").main()
    assert "no option is called 'blok_size'; did you mean 'block_size'?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole", "adapter"])
def test_a_killed_run_resumes_to_the_same_weights(
    form: str, folder: Path, text: dict[str, Any], teacher: Path, adapter: Path, tmp_path: Path
) -> None:
    settings = text | {"max_steps": 60, "save_strategy": "steps", "save_steps": 4}
    if form == "whole":
        settings |= {"student_layers": "0,2", "teacher_model_name_or_path": teacher}
    else:
        settings |= LORA | {"student_model_name_or_path": teacher, "teacher_adapter": adapter}
    launch(RECIPE, **settings, output_dir=tmp_path / "whole")
    kill_after_checkpoint(RECIPE, **settings, output_dir=tmp_path / "killed")
    results = launch(RECIPE, **settings, output_dir=tmp_path / "killed", resume_from_checkpoint="last")
    assert results["resumed_from"] is not None
    saved = [
        weights(tmp_path / name) if form == "whole" else load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
