"""`DKDTrainer` with the features of Trainer that a script may switch on."""

import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import IterableDataset
from transformers import (
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    ViTForImageClassification,
    modeling_utils,
)

from hf_dkd import DKDTrainer, Teacher, objective

from .trainer_helpers import (
    Gradients,
    PutsInTrainMode,
    arguments,
    assert_close,
    expected_logs,
    expected_terms,
    first_gradient,
    forwards,
    images,
    labelled_logits,
    logs_of,
    sentences,
    tiny,
    trained,
    vits,
    weights_of,
)

# ---- Searching ----


class Trials(TrainerCallback):
    """Keeps the settings of every step beside its log."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float, dict[str, float]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "dkd" in logs:
            self.steps.append((args.dkd_alpha, args.dkd_beta, args.dkd_temperature, dict(logs)))


def searcher(path: Path, **settings: Any) -> DKDTrainer:
    def student() -> Any:
        return tiny(ViTForImageClassification, 0)

    args, teacher = arguments(path, max_steps=2, **settings), tiny(ViTForImageClassification, 1)
    return DKDTrainer(args=args, train_dataset=images(8), eval_dataset=images(4), model_init=student, teacher=teacher)


def test_a_search_over_the_distillation_settings_trains_by_each(tmp_path):
    def space(trial: optuna.Trial) -> dict[str, float]:
        ranges = {"dkd_alpha": (0.1, 0.9), "dkd_beta": (1.1, 7.9), "dkd_temperature": (1.1, 3.9)}
        return {name: trial.suggest_float(name, *ends) for name, ends in ranges.items()}

    # Trainer casts what it tries to the type of the old value: an int must not truncate it.
    trainer, trials = searcher(tmp_path, dkd_alpha=1, dkd_beta=1, dkd_temperature=4), Trials()
    trainer.add_callback(trials)
    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna", sampler=optuna.samplers.RandomSampler(0))
    tried = [settings for *settings, _ in trials.steps]
    assert len(trials.steps) == 6
    assert len({tuple(settings) for settings in tried}) == 3
    assert list(best.hyperparameters.values()) in tried
    for alpha, beta, temperature, log in trials.steps:
        assert log["dkd"] == pytest.approx(temperature**2 * (alpha * log["tckd"] + beta * log["nckd"]), rel=1e-5)
    for alpha, beta, temperature, log in trials.steps[::2]:
        expected = expected_logs(*vits(), images(8)[:4], alpha=alpha, beta=beta, temperature=temperature)
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_search_that_tries_a_value_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dkd_temperature is -1\.0"):
        searcher(tmp_path).hyperparameter_search(
            lambda trial: {"dkd_temperature": trial.suggest_categorical("dkd_temperature", [-1.0])}, n_trials=1
        )


# ---- Batches ----


def test_a_batch_size_that_fits_is_found(tmp_path):
    micro_batches = []

    def small_memory(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        micro_batches.append(len(kwargs["pixel_values"]))
        if micro_batches[-1] > 4 and len(micro_batches) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 KiB.")

    settings = {"max_steps": 3, "gradient_accumulation_steps": 2}
    student, teacher = vits()
    student.register_forward_pre_hook(small_memory, with_kwargs=True)
    found = trained(
        tmp_path, student, images(16), teacher, auto_find_batch_size=True, per_device_train_batch_size=8, **settings
    )
    given = trained(tmp_path, tiny(ViTForImageClassification), images(16), teacher, **settings)
    # The first attempt ends in the middle of an optimizer step.
    assert micro_batches[:2] == [8, 8]
    assert micro_batches[-6:] == [4] * 6
    assert logs_of(found) == logs_of(given)
    assert torch.equal(weights_of(found.model), weights_of(given.model))


def ragged(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad sentences of different lengths."""
    columns = {name: [example[name] for example in batch] for name in ("input_ids", "attention_mask")}
    padded = {name: pad_sequence(rows, batch_first=True) for name, rows in columns.items()}
    return {**padded, "labels": torch.tensor([example["labels"] for example in batch])}


def test_sentences_are_grouped_by_length_as_trainer_does(tmp_path):
    examples = [sentences(1, length=2 + 5 * seed % 9, seed=seed)[0] for seed in range(32)]

    def batches(trainer_class: type[Trainer], **keywords: Any) -> tuple[list[dict[str, Tensor]], Trainer]:
        student = tiny(BertForSequenceClassification, 0)
        calls = forwards(student)
        args = arguments(tmp_path, max_steps=8, train_sampling_strategy="group_by_length", learning_rate=0.0)
        trainer = trainer_class(student, args, ragged, examples, **keywords)
        trainer.train()
        return calls, trainer

    teacher = tiny(BertForSequenceClassification, 1)
    seen_by_teacher = forwards(teacher)
    (ours, trainer), (theirs, _) = batches(DKDTrainer, teacher=teacher), batches(Trainer)
    assert ours[0]["attention_mask"].shape == (4, 10)
    for of_student, of_teacher, plain in zip(ours, list(seen_by_teacher), theirs, strict=True):
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(of_student[name], plain[name])
            assert torch.equal(of_student[name], of_teacher[name])
    for call, log in zip(list(ours), logs_of(trainer), strict=True):
        with torch.no_grad():
            logits, of_teacher = trainer.model(**call).logits, teacher(**call).logits
        expected = expected_terms(logits.double(), of_teacher.double(), call["labels"])
        assert log["dkd"] == pytest.approx(expected["dkd"], rel=1e-5)


class Stream(IterableDataset):
    """Examples without a length."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


@pytest.mark.parametrize("steps", [3, 0.75])
def test_a_stream_of_examples_trains_as_a_list_does(tmp_path, steps):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "dkd_warmup_steps": steps}
    student, teacher = vits()
    streamed = trained(tmp_path, student, Stream(images(32)), teacher, **settings)
    listed = trained(tmp_path, tiny(ViTForImageClassification), images(32), teacher, **settings)
    assert torch.equal(weights_of(student), weights_of(listed.model))
    weights = [log["dkd_weight"] for log in logs_of(streamed)]
    assert weights == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_a_stream_has_no_epochs_to_warm_up_in(tmp_path):
    student, teacher = vits()
    with pytest.raises(ValueError, match="dkd_warmup_epochs needs a data set with a length; set dkd_warmup_steps"):
        trained(tmp_path, student, Stream(images(8)), teacher, dkd_warmup_epochs=1.0)


# ---- Computing ----


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_student_trains_alike(tmp_path, backend):
    student, teacher = vits()
    settings = {"max_steps": 3, "eval_with_teacher": True, "gradient_accumulation_steps": 2}
    plain = trained(tmp_path, student, images(24), teacher, **settings)
    torch._dynamo.reset()
    counters.clear()
    compiled = trained(
        tmp_path, tiny(ViTForImageClassification), images(24), teacher, torch_compile=True,
        torch_compile_backend=backend, **settings,
    )  # fmt: skip
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    for log, expected in zip(logs_of(compiled), logs_of(plain), strict=True):
        assert log == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert_close(weights_of(compiled.model), weights_of(plain.model))
    assert compiled.evaluate(images(4))["eval_tckd"] == pytest.approx(plain.evaluate(images(4))["eval_tckd"], rel=1e-3)


def test_the_loss_is_computed_in_fp32_under_bf16(tmp_path, monkeypatch):
    rows: list[Any] = []
    student, teacher = vits()
    emitted: list[torch.dtype] = []
    teacher.register_forward_hook(lambda module, args, output: emitted.append(output.logits.dtype))

    def recorded(aligned: Any, settings: Any, **options: Any) -> objective.Distilled:
        rows.append(aligned)
        share = distil(aligned, settings, **options)
        assert share.loss.dtype == torch.float32
        return share

    distil = objective.distil
    monkeypatch.setattr(objective, "distil", recorded)
    (log,) = logs_of(trained(tmp_path, student, images(4), teacher, bf16=True, dkd_temperature=4.0))
    assert emitted == [torch.bfloat16]
    logits, of_teacher, labels = (tensor.detach() for tensor in rows[0][:3])
    expected = expected_terms(logits.double(), of_teacher.double(), labels, temperature=4.0)
    assert log["dkd"] == pytest.approx(expected["dkd"], rel=1e-5)
    assert log["dkd"] != pytest.approx(expected_logs(*vits(), images(4), temperature=4.0)["dkd"], rel=1e-5)
    assert log["loss"] == pytest.approx(log["ce"] + log["dkd"], abs=1e-5)


def test_gradient_checkpointing_changes_nothing_and_leaves_the_teacher_out(tmp_path, monkeypatch):
    calls: list[Any] = []

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)

    def gradient(checkpointed: bool) -> Tensor:
        student, teacher = tiny(BertForSequenceClassification, 0), tiny(BertForSequenceClassification, 1)
        if checkpointed:
            teacher.gradient_checkpointing_enable()
        args = arguments(tmp_path, gradient_checkpointing=checkpointed)
        return first_gradient(
            DKDTrainer(student, args, train_dataset=sentences(4), teacher=teacher, callbacks=[PutsInTrainMode(teacher)])
        )

    plain = gradient(False)
    assert len(calls) == 0
    assert torch.equal(gradient(True), plain)
    assert len(calls) == 2, "each of the student's two layers once"


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "examples"), [(ViTForImageClassification, images), (BertForSequenceClassification, sentences)]
)
def test_a_teacher_in_half_precision_runs_in_its_own(tmp_path, model, examples, dtype, bf16):
    def run(dtype: torch.dtype) -> tuple[float, list[torch.dtype]]:
        student, teacher = tiny(model, 0), tiny(model, 1).to(dtype)
        emitted: list[torch.dtype] = []
        teacher.register_forward_hook(lambda module, args, output: emitted.append(output.logits.dtype))
        trainer = trained(tmp_path, student, examples(4), teacher, bf16=bf16, eval_with_teacher=True)
        assert math.isfinite(trainer.evaluate(examples(4))["eval_tckd"])
        return logs_of(trainer)[0]["dkd"], emitted

    (half, emitted), (full, _) = run(dtype), run(torch.float32)
    assert emitted == [dtype] * 2
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


# ---- Adapters ----


def test_a_student_with_an_adapter_learns_from_its_own_base(tmp_path):
    base = tiny(BertForSequenceClassification, 0, hidden_dropout_prob=0.5)
    with torch.no_grad():
        of_base, _ = labelled_logits(base.eval(), sentences(4))
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], lora_dropout=0.5)
    student = get_peft_model(base, config)
    frozen = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
    modes: list[tuple[bool, bool]] = []
    for dropout in (module for module in student.modules() if isinstance(module, nn.Dropout)):
        dropout.register_forward_pre_hook(lambda module, args: modes.append((torch.is_grad_enabled(), module.training)))
    taught: list[Tensor] = []
    student.register_forward_hook(
        lambda module, args, out: None if out.logits.requires_grad else taught.append(out.logits)
    )

    gradients = Gradients()
    args = arguments(tmp_path, max_steps=3, learning_rate=0.5)
    trainer = DKDTrainer(
        student, args, train_dataset=sentences(4), teacher=Teacher.from_adapter(student), callbacks=[gradients]
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))

    # Dropout is on in every pass of the student, with gradients, and off in every pass of the teacher, without.
    assert set(modes) == {(True, True), (False, False)}
    assert len(taught) == 3
    for logits in taught:
        assert torch.allclose(logits.double(), of_base, rtol=1e-5, atol=1e-6)
    assert all(gradient.norm() > 0 for gradient in gradients.steps)
    after = dict(student.named_parameters())
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in frozen.items())
    assert all(parameter.requires_grad for name, parameter in after.items() if name not in frozen)
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert all("lora_" in name or "classifier" in name for name in saved)
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    logs = logs_of(trainer)
    assert logs[0]["loss"] == pytest.approx(logs[0]["ce"] + logs[0]["dkd"], abs=1e-5)
    assert logs[0]["dkd"] > 0


# ---- Model card ----


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"dkd_beta": 2.5, "dkd_warmup_steps": 2}, {"β": "2.5", "warm-up": "2 steps"}),
        ({"dkd_warmup_epochs": 0.5}, {"β": "1", "warm-up": "0.5 epochs"}),
        ({"distillation": "kd"}, {"warm-up": "0 steps"}),
    ],
)
def test_the_model_card_tells_how_the_student_was_distilled(tmp_path, settings, rows):
    student, teacher = vits()
    teacher.config._name_or_path = "someone/large-vit"
    shared = {"dkd_alpha": 0.5, "dkd_temperature": 4.0}
    trainer = trained(tmp_path, student, images(8), teacher, max_steps=2, **shared, **settings)
    trainer.create_model_card()
    table = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", (tmp_path / "README.md").read_text(), re.MULTILINE))
    last = logs_of(trainer)[-1]
    expected = {"teacher": "`someone/large-vit`", "α": "0.5", "T": "4", "CE weight": "1", **rows}
    expected |= {"final TCKD": f"{last['tckd']:.4g}", "final NCKD": f"{last['nckd']:.4g}"}
    expected |= {"final training loss": f"{last['loss']:.4g}"}
    assert {name: table.get(name) for name in expected} == expected
    assert ("β" in table) is ("β" in rows)


def test_a_compiled_teacher_teaches_alike(tmp_path, monkeypatch):
    # The default backend needs a C++ compiler.
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    students = []
    for compiled in (False, True):
        student, teacher = vits()
        trained(tmp_path, student, images(4), teacher, max_steps=2, teacher_compile=compiled)
        students.append(student)
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert_close(weights_of(students[1]), weights_of(students[0]))
