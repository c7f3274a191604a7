import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_dkd import Teacher
from hf_dkd.rows import logits_of
from hf_dkd.teacher import class_names_of

from .models import ARCHITECTURES, IMAGE_SIZE, VOCABULARY

CPU = torch.device("cpu")
DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}


class Mean(nn.Module):
    """A module of no library: one positional input, bare logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def prepared(model: nn.Module, name: str = "bert", **keywords: Any) -> Teacher:
    teacher = Teacher(model, **keywords)
    teacher.prepare(ARCHITECTURES[name].model(seed=7), CPU)
    return teacher


def eval_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a user would compute by hand."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return logits_of(model(**batch), "teacher")


# ---- Frozen ----


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_it_is_in_eval_mode_whatever_train_did(name: str) -> None:
    model, batch = ARCHITECTURES[name].model(**DROPOUT), ARCHITECTURES[name].batch()
    expected = eval_logits(model, batch)
    teacher = prepared(model, name)
    for _ in range(2):
        teacher.model.train()
        assert torch.equal(teacher.logits(batch), expected)
        assert not any(module.training for module in teacher.model.modules())


def test_it_stops_requiring_gradients_and_gives_none() -> None:
    model, batch = ARCHITECTURES["bert"]()
    logits = prepared(model).logits(batch)
    assert not logits.requires_grad
    assert not logits.is_inference()  # autograd may save it for the student
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_leaves_the_students_frozen_parameters_that_it_shares() -> None:
    student, model = ARCHITECTURES["bert"].model(0), ARCHITECTURES["bert"].model(1)
    model.bert.embeddings = student.bert.embeddings.requires_grad_(False)
    Teacher(model).prepare(student, CPU)
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {
        f"bert.embeddings.{n}" for n, _ in student.bert.embeddings.named_parameters()
    }
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_modules_that_it_shares_with_the_student_keep_their_mode() -> None:
    student, model = ARCHITECTURES["bert"].model(0, **DROPOUT), ARCHITECTURES["bert"].model(1, **DROPOUT)
    model.bert = student.bert.requires_grad_(False)
    teacher, batch = Teacher(model), ARCHITECTURES["bert"].batch()
    teacher.prepare(student, CPU)
    student.train()
    assert torch.equal(teacher.logits(batch), eval_logits(model, batch))
    assert all(module.training for module in student.modules())


@pytest.mark.parametrize("shares", ["all", "a layer"])
def test_trained_parameters_of_the_student_are_refused(shares: str) -> None:
    student, model = ARCHITECTURES["bert"].model(0), ARCHITECTURES["bert"].model(1)
    if shares == "a layer":
        model.bert.encoder.layer[0] = student.bert.encoder.layer[0]
    with pytest.raises(ValueError, match=r"shares trained parameters.*Teacher\.from_adapter"):
        Teacher(student if shares == "all" else model).prepare(student, CPU)


# ---- What it reads ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_logits_are_those_of_the_model_called_with_labels(name: str) -> None:
    model, batch = ARCHITECTURES[name]()
    expected = eval_logits(model, batch)
    inputs = prepared(model, name).inputs(batch)
    assert not {"labels", "start_positions", "end_positions"} & set(inputs)
    torch.testing.assert_close(Teacher(model).logits(batch), expected, rtol=0, atol=1e-6)


def test_its_columns_are_those_of_its_signature_without_labels() -> None:
    bert, vit = Teacher(ARCHITECTURES["bert"].model()), Teacher(ARCHITECTURES["vit"].model())
    assert {"input_ids", "attention_mask", "token_type_ids"} < set(bert.columns)
    assert "pixel_values" in vit.columns
    answers = Teacher(ARCHITECTURES["bert_qa"].model())
    for column in ("labels", "start_positions", "end_positions", "kwargs"):
        assert column not in (*bert.columns, *vit.columns, *answers.columns)


def test_it_reads_columns_that_the_student_lacks() -> None:
    model, batch = ARCHITECTURES["bert"]()
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    assert torch.equal(prepared(model, "distilbert").logits(batch), eval_logits(model, batch))


def test_teacher_columns_take_the_place_of_shared_ones() -> None:
    architecture = ARCHITECTURES["vit"]
    model, batch = architecture.model(image_size=2 * IMAGE_SIZE), architecture.batch()
    larger = torch.randn(8, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    logits = prepared(model, "vit").logits({**batch, "teacher_pixel_values": larger})
    assert torch.equal(logits, eval_logits(model, {"pixel_values": larger}))


def test_a_mask_that_does_not_fit_its_own_ids_is_an_error_that_names_the_column() -> None:
    model, batch = ARCHITECTURES["bert"]()
    longer = {**batch, "teacher_input_ids": torch.ones(8, 15, dtype=torch.long)}
    message = "teacher_input_ids have shape (8, 15) but attention_mask, shared with the student, has (8, 12)"
    with pytest.raises(ValueError, match=re.escape(message) + ".*bring teacher_attention_mask"):
        prepared(model).logits(longer)
    longer["teacher_attention_mask"] = torch.ones(8, 15, dtype=torch.long)
    assert prepared(model).logits(longer).shape == (8, 5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llava", "t5", "bart", "bert", "vit"])
def test_language_models_run_without_cache(name: str) -> None:
    model, batch = ARCHITECTURES[name]()
    inputs = prepared(model, name).inputs(batch)
    assert inputs.get("use_cache") is (None if name in ("bert", "vit") else False)
    assert getattr(model(**inputs), "past_key_values", None) is None


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_derives_its_decoder_inputs_from_labels(name: str) -> None:
    model, batch = ARCHITECTURES[name]()
    inputs = prepared(model, name).inputs(batch)
    expected = batch["labels"].roll(1, 1).masked_fill(batch["labels"].roll(1, 1) == -100, 0)
    expected[:, 0] = model.config.decoder_start_token_id
    assert torch.equal(inputs["decoder_input_ids"], expected)
    own = torch.ones_like(expected)
    assert torch.equal(prepared(model, name).inputs({**batch, "decoder_input_ids": own})["decoder_input_ids"], own)


def test_a_module_with_one_input_gets_the_main_one_and_may_return_a_tensor() -> None:
    batch = ARCHITECTURES["vit"].batch()
    model = Mean()
    teacher = prepared(model, "vit")
    torch.testing.assert_close(teacher.logits(batch), model(batch["pixel_values"]), rtol=0, atol=0)
    other = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(teacher.logits({**batch, "teacher_pixel_values": other}), model(other), rtol=0, atol=0)


class Counting(nn.Module):
    """A module of no library that reads ids: one positional input, bare logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(VOCABULARY, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x)


@pytest.mark.parametrize(("name", "make", "column"), [("vit", Mean, "pixel_values"), ("bert", Counting, "input_ids")])
def test_a_plain_module_runs_before_any_student_is_known(name: str, make: Any, column: str) -> None:
    model, batch = make(), ARCHITECTURES[name].batch()
    logits = Teacher(model).logits(batch)
    assert torch.equal(logits, model(batch[column]))
    assert not logits.requires_grad


def test_a_batch_without_its_columns_names_both() -> None:
    with pytest.raises(ValueError, match=r"forward names pixel_values.*the batch has input_ids, attention_mask"):
        prepared(ARCHITECTURES["vit"].model()).logits(ARCHITECTURES["bert"].batch())


def test_floats_are_cast_to_its_dtype_and_integers_are_not() -> None:
    model, batch = ARCHITECTURES["vit"]()
    teacher = prepared(model.bfloat16(), "vit")
    assert teacher.inputs(batch)["pixel_values"].dtype == torch.bfloat16
    logits = teacher.logits(batch)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, eval_logits(model, {"pixel_values": batch["pixel_values"].bfloat16()}))
    words = prepared(ARCHITECTURES["bert"].model().bfloat16()).inputs(ARCHITECTURES["bert"].batch())
    assert words["input_ids"].dtype == torch.int64


# ---- Its names ----


def test_class_names_come_from_the_config_or_from_label_names() -> None:
    names = {0: "ant", 1: "bee", 2: "cat"}
    model = ARCHITECTURES["bert"].model(num_labels=3, id2label={2: "cat", 0: "ant", 1: "bee"})
    assert Teacher(model).class_names == class_names_of(model) == list(names.values())
    assert Teacher(model, label_names=["x", "y", "z"]).class_names == ["x", "y", "z"]
    assert Teacher(Mean()).class_names is None


def test_class_names_with_keys_read_from_json_stand_in_the_order_of_their_numbers() -> None:
    names = [f"kind {index}" for index in range(12)]
    model = ARCHITECTURES["bert"].model(num_labels=12)
    model.config.id2label = {str(index): name for index, name in enumerate(names)}
    assert class_names_of(model) == Teacher(model).class_names == names


def test_name_is_the_path_it_came_from_or_its_class(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].model()
    assert Teacher(model).name == "BertForSequenceClassification"
    assert Teacher(Mean()).name == "Mean"
    model.save_pretrained(tmp_path)
    assert Teacher.from_pretrained(str(tmp_path), model).name == str(tmp_path)


# ---- Loading ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_pretrained_takes_the_auto_class_of_the_student(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    saved, batch = architecture(seed=1)
    saved.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    teacher = Teacher.from_pretrained(str(tmp_path), architecture.model(seed=2))
    assert type(teacher.model) is architecture.model_class
    torch.testing.assert_close(teacher.logits(batch), eval_logits(saved, batch), rtol=0, atol=0)


def test_from_pretrained_passes_its_keywords_on(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].model()
    model.save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(str(tmp_path), model, dtype="bfloat16", attn_implementation="eager")
    assert teacher.model.dtype == torch.bfloat16
    assert teacher.model.config._attn_implementation == "eager"


def test_a_checkpoint_without_a_trained_head_is_refused_by_the_names_of_what_it_lacks(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].model()
    model.bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}' lacks weights: classifier\.bias, classifier\.weight\."):
        Teacher.from_pretrained(tmp_path, model)


def test_a_head_of_another_size_is_refused_however_it_is_asked_for(tmp_path: Path) -> None:
    ARCHITECTURES["vit"].model().save_pretrained(tmp_path)
    keywords = {"num_labels": 7, "ignore_mismatched_sizes": True}
    with pytest.raises(ValueError, match=r"lacks weights: classifier\.bias, classifier\.weight\. They would be random"):
        Teacher.from_pretrained(str(tmp_path), ARCHITECTURES["vit"].model(), **keywords)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Teacher.from_pretrained(str(tmp_path), model)


def test_an_unknown_student_tells_no_auto_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Auto class loads a teacher for Mean.*teacher=model"):
        Teacher.from_pretrained(str(tmp_path), Mean())


def test_an_adapter_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no adapter 'missing'; its adapters: none"):
        Teacher(ARCHITECTURES["bert"].model(), adapter="missing")


class Linear(nn.Module):
    """No model of transformers: no dtype, no config."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * IMAGE_SIZE**2, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layer(pixel_values.flatten(1))


def test_a_plain_module_gets_floats_in_the_dtype_of_its_weights() -> None:
    teacher = prepared(Linear().bfloat16(), "vit")
    assert teacher.logits(ARCHITECTURES["vit"].batch()).dtype == torch.bfloat16


class Anything(Linear):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("must not be called")


def test_a_forward_that_names_nothing_is_an_error_about_columns() -> None:
    with pytest.raises(ValueError, match="none of the columns"):
        prepared(Anything(), "vit").logits(ARCHITECTURES["vit"].batch())


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "t5"])
def test_what_only_costs_memory_is_not_returned(name: str) -> None:
    model, batch = ARCHITECTURES[name](seed=0)
    model.config.output_hidden_states = True
    returned: list[Any] = []
    model.register_forward_hook(lambda module, args, output: returned.append(output))
    logits = Teacher(model).logits(batch)
    assert not [key for key in returned[0] if "hidden_states" in key and key != "encoder_last_hidden_state"]
    assert "past_key_values" not in returned[0]
    assert torch.equal(logits, returned[0].logits)
