"""Language models distilled from hidden states: the step of the logits, or a word on why it cannot be."""

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_dkd import DKDTrainer, Teacher, fused_linear_dkd_loss
from hf_dkd.heads import Head
from hf_dkd.losses import fused_linear

from .models import ARCHITECTURES
from .trainer_helpers import arguments, assert_close, first_gradient, in_rows, logs_of, tagged, tiny, weights_of

_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (tf.LlamaForCausalLM, {}),
    "tied": (tf.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "gemma2": (tf.Gemma2ForCausalLM, {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "cohere": (tf.CohereForCausalLM, {"logit_scale": 0.25}),
    "granite": (tf.GraniteForCausalLM, {"logits_scaling": 4.0}),
}


def model_of(name: str, seed: int, **changes: Any) -> Any:
    model_class, config = MODELS[name]
    tf.set_seed(seed)
    return model_class(model_class.config_class(**{**_DECODER, **config, **changes}))


def texts(count: int = 4) -> list[dict[str, Any]]:
    examples = tagged([6, 3, 0, 5][:count], classes=64)
    return [example | {"labels": example["input_ids"].where(example["labels"] >= 0, -100)} for example in examples]


def step(
    path: Path, student: nn.Module, examples: Any, teacher: Any, **settings: Any
) -> tuple[Tensor, dict[str, float], DKDTrainer]:
    """The gradient of one step, its log and the trainer."""
    trainer = DKDTrainer(student, arguments(path, **settings), train_dataset=examples, teacher=teacher)
    gradient = first_gradient(trainer)
    return gradient, logs_of(trainer)[0], trainer


def assert_fused_is_the_step_of_logits(
    path: Path, build: Any, examples: Any, teacher: Any, **settings: Any
) -> DKDTrainer:
    fused, log, trainer = step(path, build(), examples, teacher, use_fused_linear="always", **settings)
    plain, expected, other = step(path, build(), examples, teacher, use_fused_linear="never", **settings)
    assert trainer._tried.head is not None
    assert other._tried.head is None
    assert_close(fused, plain)
    names = ("loss", "ce", "dkd", "tckd", "nckd", "teacher_agreement")
    assert [log[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5, abs=1e-6)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [{}, {"dkd_temperature": 2.0, "dkd_beta": 4.0, "ce_weight": 0.5}, {"ce_weight": 0.0}, {"distillation": "kd"}],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_that_of_the_logits(tmp_path, name, settings):
    build = lambda: model_of(name, 0)  # noqa: E731
    teacher = model_of(name, 1, hidden_size=32, intermediate_size=16)
    assert_fused_is_the_step_of_logits(tmp_path, build, texts(), teacher, **settings)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert_mlm", "llama"])
def test_other_language_models_too(tmp_path, name):
    architecture = ARCHITECTURES[name]
    _, batch = architecture(seed=0)
    build = lambda: architecture.model(seed=0)  # noqa: E731
    assert_fused_is_the_step_of_logits(
        tmp_path, build, in_rows(batch), architecture.model(seed=1), per_device_train_batch_size=8
    )


def test_the_logits_are_never_made(tmp_path, monkeypatch):
    student, teacher = model_of("llama", 0), model_of("llama", 1)
    positions: list[int] = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda _, args, output: positions.append(output.shape[-2]))
    trainer = DKDTrainer(student, arguments(tmp_path, max_steps=3), train_dataset=texts(), teacher=teacher)
    blocks: list[int] = []
    linear = fused_linear._block
    monkeypatch.setattr(
        fused_linear, "_block", lambda hidden, *rest: blocks.append(len(hidden)) or linear(hidden, *rest)
    )
    trainer.train()
    # The trial comes first, with and without labels and of the teacher; then no position at all in three steps.
    assert positions[3:] == [0] * 6
    assert len(positions) == 9
    # Of 24 positions 14 have a label, the first of each example has no logits before it.
    labelled = sum(int((example["labels"][1:] >= 0).sum()) for example in texts())
    assert blocks == [labelled] * 3


class Watches(DKDTrainer):
    """A script's trainer that looks at what the student made of the batch."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.seen = outputs.loss, outputs.logits
        return (loss, outputs) if return_outputs else loss


def test_a_subclass_that_asks_for_outputs_gets_them_whole(tmp_path):
    trainer = Watches(model_of("llama", 0), arguments(tmp_path), train_dataset=texts(), teacher=model_of("llama", 1))
    gradient = first_gradient(trainer)
    loss, logits = trainer.seen
    assert logits.shape == (4, 6, 64)
    assert loss.item() == pytest.approx(logs_of(trainer)[0]["ce"], rel=1e-5)
    assert_close(gradient, step(tmp_path, model_of("llama", 0), texts(), model_of("llama", 1))[0])


def test_always_and_outputs_exclude_each_other(tmp_path):
    args = arguments(tmp_path, use_fused_linear="always")
    trainer = Watches(model_of("llama", 0), args, train_dataset=texts(), teacher=model_of("llama", 1))
    with pytest.raises(ValueError, match='"always", but a subclass asks compute_loss for outputs'):
        trainer.train()


def test_evaluation_has_its_logits(tmp_path):
    seen: list[tuple[int, ...]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    trainer = DKDTrainer(
        model_of("llama", 0),
        arguments(tmp_path, eval_with_teacher=True),
        train_dataset=texts(),
        eval_dataset=texts(),
        compute_metrics=compute_metrics,
        teacher=model_of("llama", 1),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert seen == [(4, 6, 64)]
    assert metrics["eval_nckd"] > 0


def test_vocabularies_with_other_padding_rows_share_what_they_share(tmp_path):
    trainer = assert_fused_is_the_step_of_logits(
        tmp_path, lambda: model_of("llama", 0, vocab_size=70), texts(), model_of("llama", 1, vocab_size=66)
    )
    assert any("70 (student) and 66 (teacher)" in said for said in trainer._said)


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="The student has 64 classes and the teacher 128"):
        step(tmp_path, model_of("llama", 0), texts(), model_of("llama", 1, vocab_size=128))


def test_adapters_and_their_base_as_the_teacher(tmp_path):
    def build() -> Any:
        tf.set_seed(3)
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model_of("llama", 0), config)

    steps = []
    for use in ("always", "never"):
        student = build()
        steps.append(step(tmp_path, student, texts(), Teacher.from_adapter(student), use_fused_linear=use))
        assert student.base_model.model.lm_head.weight.grad is None
    assert_close(steps[0][0], steps[1][0])
    assert steps[0][1]["dkd"] == pytest.approx(steps[1][1]["dkd"], rel=1e-5)
    assert steps[0][1]["dkd"] > 0


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}]
)
def test_checkpointing_and_accumulation(tmp_path, settings):
    teacher = model_of("llama", 1)
    assert_fused_is_the_step_of_logits(tmp_path, lambda: model_of("llama", 0), texts(), teacher, **settings)


def test_under_bf16_it_is_the_step_of_logits_up_to_its_rounding(tmp_path):
    teacher = model_of("llama", 1)
    steps = [
        step(tmp_path, model_of("llama", 0), texts(), teacher, bf16=True, use_fused_linear=use)
        for use in ("always", "never")
    ]
    assert_close(steps[0][0], steps[1][0], 2e-2)
    assert steps[0][1]["loss"] == pytest.approx(steps[1][1]["loss"], rel=2e-2)


def test_two_trainings_with_dropout_are_one(tmp_path):
    # The trial before the first step draws nothing random.
    weights = []
    for use in ("always", "never"):
        student = model_of("llama", 0, attention_dropout=0.3)
        trainer = DKDTrainer(
            student,
            arguments(tmp_path, max_steps=4, use_fused_linear=use),
            train_dataset=texts(),
            teacher=model_of("llama", 1),
        )
        trainer.train()
        assert student.training
        weights.append(weights_of(student))
    assert_close(weights[0], weights[1])


class Shifted(tf.LlamaForCausalLM):
    """Logits that are not what the last layer makes."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, attention_mask, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        if labels is not None:
            output["loss"] = self.loss_function(output.logits, labels, self.vocab_size)
        return output


def test_where_it_cannot_be_logits_are_made_and_it_is_said_once(tmp_path, caplog):
    shifted = Shifted(tf.LlamaConfig(**_DECODER))
    adapted = peft.get_peft_model(
        model_of("llama", 0), peft.LoraConfig(target_modules=["lm_head"], r=2, task_type="CAUSAL_LM")
    )
    routed = tiny(tf.MixtralForCausalLM, 0, output_router_logits=True)
    cases: list[tuple[Any, Any, dict[str, Any], str, bool]] = [
        (shifted, None, {}, "its logits are not what its last layer makes", True),
        (None, shifted, {}, "of the teacher, its logits are not what", True),
        (adapted, None, {}, "head is not one linear layer", True),
        (routed, None, {}, "its loss is not the cross-entropy", False),
        (None, None, {"dkd_top_k": 3}, "dkd_top_k looks at whole rows", True),
        (None, None, {"label_smoothing_factor": 0.1}, "hard-label loss is not the model's own", False),
    ]
    for student, teacher, settings, reason, plain_loss in cases:
        student = model_of("llama", 0) if student is None else student
        teacher = model_of("llama", 1) if teacher is None else teacher
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_dkd"):
            trainer = DKDTrainer(
                student, arguments(tmp_path, max_steps=2, **settings), train_dataset=texts(), teacher=teacher
            )
            trainer.train()
        said = [record.message for record in caplog.records if "fused linear loss is not used" in record.message]
        assert len(said) == 1, (reason, said)
        assert reason in said[0]
        assert trainer._tried.plain_loss == plain_loss
        assert all(log["dkd"] > 0 and log["ce"] > 0 for log in logs_of(trainer))


class LastPosition(tf.LlamaForCausalLM):
    """A model that without labels has the logits of the last position alone."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(
            input_ids, attention_mask, labels=labels, logits_to_keep=0 if labels is not None else 1, **kwargs
        )


class NeedsLabels(tf.LlamaForCausalLM):
    """A model that does not run without labels."""

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


class Regularised(tf.LlamaForCausalLM):
    """A model whose loss has a little more in training."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None and self.training:
            output["loss"] = output.loss + 1e-4 * self.lm_head.weight.square().sum()
        return output


@pytest.mark.parametrize("student_class", [LastPosition, NeedsLabels, Regularised])
def test_a_model_that_needs_its_labels_keeps_them(tmp_path, student_class):
    tf.set_seed(0)
    student, plain = student_class(tf.LlamaConfig(**_DECODER)), model_of("llama", 0)
    student.load_state_dict(plain.state_dict())
    _, log, trainer = step(tmp_path, student, texts(), model_of("llama", 1))
    _, expected, _ = step(tmp_path, plain, texts(), model_of("llama", 1), use_fused_linear="never")
    assert not trainer._tried.plain_loss
    more = 1e-4 * model_of("llama", 0).lm_head.weight.square().sum().item() if student_class is Regularised else 0.0
    assert log["ce"] == pytest.approx(expected["ce"] + more, abs=1e-6)
    assert log["dkd"] == pytest.approx(expected["dkd"], rel=1e-5)


def test_a_small_loss_of_routers_is_not_lost(tmp_path):
    settings = {"output_router_logits": True, "router_aux_loss_coef": 1e-6}
    _, _, trainer = step(tmp_path, tiny(tf.MixtralForCausalLM, 0, **settings), texts(), tiny(tf.MixtralForCausalLM, 1))
    assert not trainer._tried.plain_loss


def test_always_says_why_not(tmp_path):
    with pytest.raises(
        ValueError, match='use_fused_linear is "always", and cannot be: dkd_standardize looks at whole rows'
    ):
        step(
            tmp_path,
            model_of("llama", 0),
            texts(),
            model_of("llama", 1),
            use_fused_linear="always",
            dkd_standardize=True,
        )


def test_a_teacher_that_breaks_is_named_with_its_step(tmp_path):
    teacher = model_of("llama", 1)
    trainer = DKDTrainer(model_of("llama", 0), arguments(tmp_path, max_steps=3), train_dataset=texts(), teacher=teacher)

    class Breaks(tf.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                teacher.lm_head.weight.data.fill_(torch.nan)

    trainer.add_callback(Breaks())
    with pytest.raises(ValueError, match=r"At step 2 the teacher emitted a row.*input_ids"):
        trainer.train()


def test_the_loss_is_the_public_function_of_the_hidden_states(tmp_path):
    student, teacher, examples = model_of("llama", 0), model_of("llama", 1), texts()
    _, log, trainer = step(tmp_path, model_of("llama", 0), examples, teacher, dkd_beta=3.0)
    assert trainer.head is Head.CAUSAL_LM
    batch = tf.default_data_collator(examples)
    hidden = [model.model(batch["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1) for model in (student, teacher)]
    found = fused_linear_dkd_loss(
        hidden[0],
        student.lm_head.weight,
        hidden[1],
        teacher.lm_head.weight,
        batch["labels"][:, 1:].flatten(),
        beta=3.0,
        ce_weight=1.0,
    )
    assert log["loss"] == pytest.approx(found.loss.item(), rel=1e-5)
    assert log["nckd"] == pytest.approx(found.nckd.item(), rel=1e-5)
