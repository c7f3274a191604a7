"""`DKDMixin` over the trainers and loss functions that scripts bring: whose scale it is, and what they may return."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
    Trainer,
)
from transformers.modeling_outputs import ImageClassifierOutput

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
    vits,
)

# ---- The parent's scale ----


class TakesAnything(nn.Module):
    """A model of no library, whose `**kwargs` make Trainer count labels for it; its loss is a mean all the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class MeanTrainer(Trainer):
    """A script's trainer that says that its loss is a mean over the micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = False


class MeanDKDTrainer(DKDMixin, MeanTrainer):
    """The same, with the room for a teacher."""


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this Trainer lets no subclass say")
def test_without_a_teacher_and_a_known_head_the_scale_is_the_parents(tmp_path):
    def run(trainer_class: type[Trainer], **split: int) -> tuple[Tensor, float]:
        trainer = trainer_class(TakesAnything(), arguments(tmp_path, **split), train_dataset=images(8))
        return first_gradient(trainer), logs_of(trainer)[0]["loss"]

    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    (ours, loss), (theirs, expected) = run(MeanDKDTrainer, **split), run(MeanTrainer, **split)
    assert torch.equal(ours, theirs)
    assert loss == expected
    assert_close(ours, run(Trainer, per_device_train_batch_size=8)[0])


@pytest.mark.parametrize(
    ("model", "examples"),
    [
        (BertForSequenceClassification, sentences(8)),
        (GPT2LMHeadModel, tagged([6, 1, 3, 5, 0, 0, 4, 6])),
        (BertForTokenClassification, tagged([6, 1, 3, 5, 0, 0, 4, 6])),
    ],
)
def test_without_weight_a_teacher_changes_nothing(tmp_path, model, examples):
    def run(**keywords: Any) -> tuple[Tensor, float]:
        weights = {"dkd_alpha": 0.0, "dkd_beta": 0.0} if keywords else {}
        args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **weights)
        trainer = DKDTrainer(tiny(model, 0), args, train_dataset=examples, **keywords)
        return first_gradient(trainer), logs_of(trainer)[0]["loss"]

    (taught, loss), (alone, expected) = run(teacher=tiny(model, 1)), run()
    assert torch.equal(taught, alone)
    assert loss == expected


# ---- What the parent returns ----

OUTPUTS = {
    "dictionary": lambda loss, logits: {"logits": logits},
    "dictionary with loss": lambda loss, logits: {"loss": loss, "logits": logits},
    "output of transformers": lambda loss, logits: ImageClassifierOutput(logits=logits),
    "tuple": lambda loss, logits: (loss, logits),
    "tuple without loss": lambda loss, logits: (logits,),
    "logits": lambda loss, logits: logits,
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_outputs_of_a_parent_may_be_of_any_kind(tmp_path, kind):
    class ParentTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(pixel_values=inputs["pixel_values"]).logits
            loss = 5 * cross_entropy(logits, inputs["labels"])
            return (loss, OUTPUTS[kind](loss, logits)) if return_outputs else loss

    class ParentDKDTrainer(DKDMixin, ParentTrainer):
        pass

    student, teacher = vits()
    expected = expected_logs(student, teacher, images(8))
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, eval_with_teacher=True)
    trainer = ParentDKDTrainer(student, args, train_dataset=images(8), teacher=teacher)
    metrics = trainer.evaluate(images(8))
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["ce"] == pytest.approx(5 * expected["ce"], rel=1e-5)
    assert log["dkd"] == pytest.approx(expected["dkd"], rel=1e-5)
    assert log["loss"] == pytest.approx(log["ce"] + log["dkd"], rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(log["ce"], rel=1e-5)
    assert metrics["eval_tckd"] == pytest.approx(expected["tckd"], rel=1e-5)


def test_a_parent_that_returns_no_logits_is_an_error_that_says_so(tmp_path):
    class ParentTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss
            return (loss, {"loss": loss}) if return_outputs else loss

    class ParentDKDTrainer(DKDMixin, ParentTrainer):
        pass

    student, teacher = vits()
    trainer = ParentDKDTrainer(student, arguments(tmp_path), train_dataset=images(4), teacher=teacher)
    with pytest.raises(ValueError, match=r"student's outputs hold no logits \(found: loss\)"):
        trainer.train()


# ---- Micro-batches without a label ----


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    loss = cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
    return loss / num_items_in_batch


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize(
    ("settings", "keywords"), [({"label_smoothing_factor": 0.1}, {}), ({}, {"compute_loss_func": summed})]
)
def test_a_micro_batch_without_labels_adds_nothing(tmp_path, settings, keywords, taught):
    def run(size: int, steps: int) -> tuple[Tensor, dict[str, float]]:
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        student, teacher = tiny(BertForTokenClassification, 0), tiny(BertForTokenClassification, 1)
        trainer = DKDTrainer(
            student, arguments(tmp_path, **settings, **split), train_dataset=tagged([0, 0, 0, 0, 3, 5, 2, 1]),
            teacher=teacher if taught else None, **keywords,
        )  # fmt: skip
        return first_gradient(trainer), logs_of(trainer)[0]

    whole, log = run(8, 1)
    assert whole.norm() > 0
    for split in ((4, 2), (2, 4)):
        gradient, other = run(*split)
        assert_close(gradient, whole)
        assert other == pytest.approx(log, rel=1e-5)
