"""The hard-label term of `DKDTrainer`: smoothing, own loss functions, auxiliary losses and parent trainers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2LMHeadModel,
    MixtralForCausalLM,
    Trainer,
    ViTForImageClassification,
    default_data_collator,
)

from hf_dkd import DKDMixin, DKDTrainer

from .trainer_helpers import (
    arguments,
    assert_close,
    expected_logs,
    first_gradient,
    images,
    logs_of,
    sentences,
    tagged,
    tiny,
    trained,
)


@pytest.mark.parametrize(
    ("model", "examples"), [(ViTForImageClassification, images(4)), (BertForTokenClassification, tagged([6, 1, 0, 3]))]
)
@pytest.mark.parametrize("distils", [0.0, 1.0])
def test_label_smoothing_is_trainers(tmp_path, model, examples, distils):
    settings = {"label_smoothing_factor": 0.2, "learning_rate": 0.0}
    plain = Trainer(tiny(model), arguments(tmp_path, **settings), train_dataset=examples)
    plain.train()
    distillation = expected_logs(tiny(model, 0), tiny(model, 1), examples)["dkd"] if distils else 0.0
    (log,) = logs_of(
        trained(tmp_path, tiny(model), examples, tiny(model, 1), dkd_alpha=distils, dkd_beta=distils, **settings)
    )
    assert log["ce"] == pytest.approx(logs_of(plain)[0]["loss"], rel=1e-5)
    assert log["loss"] == pytest.approx(log["ce"] + distillation, rel=1e-5)


def test_an_own_loss_function_gets_the_count_of_the_step(tmp_path):
    counts: list[int] = []

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        counts.append(int(num_items_in_batch))
        return 3 * cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    def run(trainer_class: type[Trainer], **keywords: Any) -> dict[str, float]:
        args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        trainer = trainer_class(
            tiny(BertForTokenClassification), args, train_dataset=examples, compute_loss_func=own, **keywords
        )
        trainer.train()
        return logs_of(trainer)[0]

    examples = tagged([6, 1, 0, 3])
    expected = expected_logs(tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1), examples)
    plain = run(Trainer)
    ours = run(DKDTrainer, teacher=tiny(BertForTokenClassification, 1))
    assert counts == [10] * 4
    assert ours["ce"] == pytest.approx(plain["loss"], rel=1e-5)
    assert ours["ce"] == pytest.approx(3 * expected["ce"], rel=1e-5)
    assert ours["loss"] == pytest.approx(ours["ce"] + expected["dkd"], rel=1e-5)


def test_auxiliary_losses_of_the_model_are_in_the_hard_term(tmp_path):
    config = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    student, teacher = tiny(MixtralForCausalLM, 0, **config), tiny(GPT2LMHeadModel, 1)
    examples = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in sentences(4)]
    with torch.no_grad():
        outputs = student(**default_data_collator(examples))
    auxiliary = 0.5 * outputs.aux_loss.item()
    (log,) = logs_of(trained(tmp_path, student, examples, teacher))
    assert auxiliary > 0.1
    assert log["ce"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(log["ce"] + log["tckd"] + log["nckd"], rel=1e-5)


class WeightedTrainer(Trainer):
    """A script's trainer with class weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = cross_entropy(outputs.logits, inputs["labels"], weight=torch.tensor([1.0, 2.0, 4.0, 8.0]))
        return (loss, outputs) if return_outputs else loss


class WeightedDKDTrainer(DKDMixin, WeightedTrainer):
    """The same, distilled."""


def test_the_loss_of_a_parent_trainer_is_the_hard_term(tmp_path):
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
    expected = expected_logs(student, teacher, images(4))
    plain = WeightedTrainer(tiny(ViTForImageClassification), arguments(tmp_path), train_dataset=images(4))
    plain.train()
    trainer = WeightedDKDTrainer(student, arguments(tmp_path), train_dataset=images(4), teacher=teacher)
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["ce"] == pytest.approx(logs_of(plain)[0]["loss"], rel=1e-6)
    assert log["ce"] != pytest.approx(expected["ce"], rel=1e-3)
    assert log["loss"] == pytest.approx(log["ce"] + expected["dkd"], rel=1e-5)
    assert trainer.evaluate(images(4))["eval_loss"] == pytest.approx(plain_loss(trainer), rel=1e-6)


def plain_loss(trainer: WeightedDKDTrainer) -> float:
    """The loss of the parent trainer's own evaluation of the same model."""
    return WeightedTrainer(trainer.model, trainer.args).evaluate(images(4))["eval_loss"]


class TenfoldTrainer(Trainer):
    """A script's trainer that scales the loss of its model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (10 * outputs.loss, outputs) if return_outputs else 10 * outputs.loss


class TenfoldDKDTrainer(DKDMixin, TenfoldTrainer):
    """The same, distilled."""


def questions(count: int) -> list[dict[str, Any]]:
    """Sentences with the positions where an answer starts and ends."""
    examples = [{**e, "start_positions": i % 4, "end_positions": 2 + i % 4} for i, e in enumerate(sentences(count))]
    return [{name: value for name, value in example.items() if name != "labels"} for example in examples]


def test_the_loss_of_a_parent_trainer_is_the_hard_term_of_question_answering_too(tmp_path):
    student, plain, teacher = (tiny(BertForQuestionAnswering, seed, num_labels=2) for seed in (0, 0, 1))
    theirs = TenfoldTrainer(plain, arguments(tmp_path), train_dataset=questions(4))
    ours = TenfoldDKDTrainer(student, arguments(tmp_path), train_dataset=questions(4), teacher=teacher)
    theirs.train()
    ours.train()
    assert logs_of(ours)[0]["ce"] == pytest.approx(logs_of(theirs)[0]["loss"], rel=1e-5)


class ForwardingTrainer(Trainer):
    """A script's trainer that adds nothing to the loss."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class ForwardingDKDTrainer(DKDMixin, ForwardingTrainer):
    """The same, distilled."""


@pytest.mark.parametrize("trainer_class", [DKDTrainer, ForwardingDKDTrainer])
def test_an_answer_outside_the_window_does_not_weigh_the_others_double(tmp_path, trainer_class):
    examples = questions(4)
    for example in examples[:3]:
        example["end_positions"] = 10_000
    student, teacher = (tiny(BertForQuestionAnswering, seed, num_labels=2) for seed in (0, 1))
    with torch.no_grad():
        outputs = student(**{k: v for k, v in default_data_collator(examples).items() if "positions" not in k})
    starts = torch.tensor([example["start_positions"] for example in examples])
    losses = cross_entropy(outputs.start_logits, starts, reduction="sum")
    losses += cross_entropy(outputs.end_logits[3:], torch.tensor([examples[3]["end_positions"]]))
    trainer = trainer_class(student, arguments(tmp_path), train_dataset=examples, teacher=teacher)
    trainer.train()
    assert logs_of(trainer)[0]["ce"] == pytest.approx(losses.item() / 5, rel=1e-5)


class MaskedTrainer(Trainer):
    """A script's trainer that masks rows without a label itself: 0 / 0 for a batch that has none."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        labels = inputs["labels"].flatten()
        rows = cross_entropy(outputs.logits.flatten(0, 1), labels.clamp(min=0), reduction="none")
        loss = (rows * (labels != -100)).sum() / (labels != -100).sum()
        return (loss, outputs) if return_outputs else loss


class MaskedDKDTrainer(DKDMixin, MaskedTrainer):
    """The same, distilled."""


def test_a_micro_batch_without_labels_adds_nothing_to_the_gradient_of_a_parents_loss(tmp_path):
    def gradient(steps: int) -> Tensor:
        args = arguments(tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)
        student, teacher = tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1)
        examples = tagged([0, 0, 3, 5, 2, 1, 0, 0])
        return first_gradient(MaskedDKDTrainer(student, args, train_dataset=examples, teacher=teacher))

    assert_close(gradient(4), gradient(1))
