"""A teacher made of the student's own base model."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hf_dkd import Teacher
from hf_dkd.heads import auto_class_name
from hf_dkd.rows import logits_of

from .models import ARCHITECTURES

NAMES = ["bert", "llama"]


def lora(name: str, **keywords: Any) -> LoraConfig:
    if name == "bert":
        return LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], **keywords)
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **keywords)


def trained(name: str) -> PeftModel:
    """A student with two adapters whose every weight moved; "default" is active and trains."""
    model = get_peft_model(ARCHITECTURES[name].model(), lora(name, lora_dropout=0.5))
    model.add_adapter("expert", lora(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "default" in parameter_name or "expert" in parameter_name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def logits_by_hand(model: nn.Module, batch: dict[str, Tensor], adapter: str | None = None) -> Tensor:
    model = copy.deepcopy(model).eval()
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.no_grad():
        return logits_of(model(**batch), "teacher")


def state_of(model: PeftModel) -> tuple[Any, ...]:
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        model.active_adapter,
        list(model.base_model.active_adapters),
    )


@pytest.mark.parametrize("name", NAMES)
def test_without_adapters_the_logits_are_those_of_the_base(name: str) -> None:
    base, batch = ARCHITECTURES[name]()
    student = trained(name)
    logits = Teacher.from_adapter(student).logits(batch)
    assert torch.equal(logits, logits_by_hand(base, batch))
    assert not torch.allclose(logits, logits_by_hand(student, batch), atol=1e-2)
    assert not logits.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_another_adapter_gives_its_own_logits(name: str) -> None:
    student, batch = trained(name), ARCHITECTURES[name].batch()
    logits = Teacher.from_adapter(student, "expert").logits(batch)
    assert torch.equal(logits, logits_by_hand(student, batch, "expert"))
    assert not torch.allclose(logits, logits_by_hand(student, batch, "default"), atol=1e-2)


@pytest.mark.parametrize("adapter", [None, "expert"])
@pytest.mark.parametrize("name", NAMES)
def test_the_student_is_left_as_it_was(name: str, adapter: str | None) -> None:
    student, batch = trained(name).train(), ARCHITECTURES[name].batch()
    teacher = Teacher.from_adapter(student, adapter)
    teacher.prepare(student, torch.device("cpu"))
    for change in ("none", "some modules in eval mode", "some parameters frozen", "a base layer trained"):
        if change == "some modules in eval mode":
            for module in list(student.modules())[::3]:
                module.training = False
        elif change == "some parameters frozen":
            for parameter in [p for p in student.parameters() if p.requires_grad][::2]:
                parameter.requires_grad_(False)
        elif change == "a base layer trained":
            next(p for n, p in student.named_parameters() if "norm" in n.lower()).requires_grad_(True)
        before = state_of(student)
        teacher.logits(batch)
        assert state_of(student) == before


def test_the_student_is_left_as_it_was_when_the_teacher_fails() -> None:
    student, batch = trained("bert").train(), ARCHITECTURES["bert"].batch()
    before = state_of(student)
    with pytest.raises(IndexError):
        Teacher.from_adapter(student, "expert").logits({**batch, "input_ids": batch["input_ids"] + 1000})
    assert state_of(student) == before


def test_the_student_still_learns_from_a_teacher_within_it() -> None:
    student, batch = trained("bert").train(), ARCHITECTURES["bert"].batch()
    before = student(**batch)
    target = Teacher.from_adapter(student).logits(batch)
    student(**batch).logits.sub(target).square().sum().backward()
    assert before.loss.requires_grad
    learning = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, parameter in student.named_parameters() if ".default." in name}


def test_a_second_model_can_teach_with_one_of_its_adapters() -> None:
    model, batch = trained("bert"), ARCHITECTURES["bert"].batch()
    expected = logits_by_hand(model, batch, "expert")
    teacher = Teacher(model, adapter="expert")
    teacher.prepare(ARCHITECTURES["bert"].model(seed=3), torch.device("cpu"))
    model.train()
    assert torch.equal(teacher.logits(batch), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def saved_adapter(name: str, path: Path, config: LoraConfig) -> PeftModel:
    """A model with an adapter of random weights, whose base and adapter are in two folders."""
    ARCHITECTURES[name].model().save_pretrained(path / "base")
    model = get_peft_model(type(ARCHITECTURES[name].model()).from_pretrained(path / "base"), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    model.save_pretrained(path / "adapter")
    assert not (path / "adapter" / "model.safetensors").exists()
    return model


def refusal_of_what_transformers_misses(name: str, adapter: Path) -> Any:
    """With Transformers 5.17 and peft 0.19 the weights of a BERT's adapter stay random; then the teacher is refused."""
    auto = getattr(tf, auto_class_name(ARCHITECTURES[name].model()))
    missing = auto.from_pretrained(adapter, output_loading_info=True)[1]["missing_keys"]
    return pytest.raises(ValueError, match=f"lacks weights: {min(missing)}") if missing else nullcontext()


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_an_adapter_is_loaded_on_its_base(name: str, tmp_path: Path) -> None:
    modules = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"]}[name]
    model = saved_adapter(name, tmp_path, LoraConfig(r=4, target_modules=modules))
    batch = ARCHITECTURES[name].batch()
    with refusal_of_what_transformers_misses(name, tmp_path / "adapter"):
        teacher = Teacher.from_pretrained(tmp_path / "adapter", ARCHITECTURES[name].model(seed=3))
        assert teacher.name == str(tmp_path / "adapter")
        assert torch.equal(teacher.logits(batch), logits_by_hand(model, batch))
        assert not torch.allclose(teacher.logits(batch), Teacher.from_adapter(model).logits(batch), atol=1e-2)


def test_a_head_that_an_adapter_saved_whole_is_never_a_random_one(tmp_path: Path) -> None:
    model, batch = saved_adapter("bert", tmp_path, lora("bert")), ARCHITECTURES["bert"].batch()
    with refusal_of_what_transformers_misses("bert", tmp_path / "adapter"):
        teacher = Teacher.from_pretrained(tmp_path / "adapter", ARCHITECTURES["bert"].model(seed=3))
        assert torch.equal(teacher.logits(batch), logits_by_hand(model, batch))


def test_the_adapter_that_is_trained_cannot_teach() -> None:
    student = trained("bert")
    teacher = Teacher.from_adapter(student, "default")
    with pytest.raises(ValueError, match=r"'default' is the one that is trained.*Name another adapter, or None"):
        teacher.prepare(student, torch.device("cpu"))


def test_an_adapter_of_another_model_than_the_trained_one_is_refused() -> None:
    teacher = Teacher.from_adapter(trained("bert"), "expert")
    for student in (trained("bert"), ARCHITECTURES["bert"].model()):
        with pytest.raises(ValueError, match="another model than the student that is trained: pass it the trainer's"):
            teacher.prepare(student, torch.device("cpu"))


@pytest.mark.parametrize(("adapter", "says"), [(None, "with adapters off"), ("expert", "with adapter 'expert'")])
def test_its_name_tells_the_adapter(adapter: str | None, says: str) -> None:
    name = Teacher.from_adapter(trained("bert"), adapter).name
    assert name == f"BertForSequenceClassification {says}"


def test_a_student_without_adapters_cannot_teach_itself() -> None:
    with pytest.raises(ValueError, match=r"needs a peft model, got BertForSequenceClassification.*get_peft_model"):
        Teacher.from_adapter(ARCHITECTURES["bert"].model())


@pytest.mark.parametrize("make", [Teacher.from_adapter, lambda model, name: Teacher(model, adapter=name)])
def test_a_missing_adapter_is_an_error_that_lists_those_there_are(make: Any) -> None:
    with pytest.raises(ValueError, match="no adapter 'missing'; its adapters: default, expert"):
        make(trained("bert"), "missing")


def test_several_active_adapters_stay_active() -> None:
    student, batch = trained("llama"), ARCHITECTURES["llama"].batch()
    student.base_model.set_adapter(["default", "expert"])
    Teacher.from_adapter(student, "expert").logits(batch)
    assert student.base_model.active_adapters == ["default", "expert"]


def test_an_adapter_of_transformers_alone_is_refused_by_name_of_the_remedy() -> None:
    model = ARCHITECTURES["llama"].model()
    model.add_adapter(lora("llama"))
    with pytest.raises(ValueError, match="get_peft_model"):
        Teacher.from_adapter(model)
