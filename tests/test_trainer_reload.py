"""Checkpoints of `DKDTrainer`: what resuming and the best model load is what was saved, whatever the student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertForSequenceClassification, GPT2LMHeadModel, TrainerCallback, ViTForImageClassification

from hf_dkd import DKDTrainer

from .trainer_helpers import arguments, images, logs_of, sentences, tiny, weights_of


def with_own_head(model_class: Any, seed: int) -> Any:
    """A model of transformers whose head a script has replaced."""
    model = tiny(model_class, seed)
    model.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(16, 4))
    nn.init.normal_(model.classifier[1].weight, std=0.3)
    return model


class TwoArgumentBert(BertForSequenceClassification):
    """A script's model that from_pretrained(path) alone cannot make."""

    def __init__(self, config: Any, scale: float) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        outputs.logits = outputs.logits * self.scale
        outputs.loss = None if labels is None else cross_entropy(outputs.logits, labels)
        return outputs


def bert_of_two_arguments(seed: int) -> TwoArgumentBert:
    config = tiny(BertForSequenceClassification).config
    torch.manual_seed(seed)
    return TwoArgumentBert(config, 2.0 + seed)


def stories(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in sentences(count, seed=seed)]


STUDENTS = {
    "bert": (lambda seed: tiny(BertForSequenceClassification, seed), sentences),
    "vit": (lambda seed: tiny(ViTForImageClassification, seed), images),
    "bert with an own head": (lambda seed: with_own_head(BertForSequenceClassification, seed), sentences),
    "vit with an own head": (lambda seed: with_own_head(ViTForImageClassification, seed), images),
    "bert of two arguments": (bert_of_two_arguments, sentences),
    "gpt2 with tied weights": (lambda seed: tiny(GPT2LMHeadModel, seed), stories),
}
SAVES = {"save_strategy": "steps", "save_steps": 1, "dkd_warmup_steps": 4}


class WeightsOfSteps(TrainerCallback):
    """Keeps the weights after every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(weights_of(model))


def run(path: Path, make: Callable[[int], Any], examples: Callable, seed: int, **settings: Any) -> tuple[Any, Any]:
    weights = WeightsOfSteps()
    resume, compute_metrics = (settings.pop(name, None) for name in ("resume_from_checkpoint", "compute_metrics"))
    trainer = DKDTrainer(
        make(seed), arguments(path, **SAVES, **settings), train_dataset=examples(16), eval_dataset=examples(8, seed=1),
        teacher=make(7), callbacks=[weights], compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, weights.steps


@pytest.mark.parametrize(("make", "examples"), STUDENTS.values(), ids=STUDENTS)
def test_resuming_trains_on_from_the_weights_of_the_checkpoint(tmp_path, make, examples):
    whole, expected = run(tmp_path, make, examples, 0, max_steps=4)
    checkpoint = str(tmp_path / "checkpoint-2")
    # From other weights than those that were saved.
    resumed, weights = run(tmp_path, make, examples, 5, max_steps=4, resume_from_checkpoint=checkpoint)
    assert len(weights) == 2
    assert torch.equal(weights[0], expected[2])
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert logs_of(resumed)[2:] == logs_of(whole)[2:]


@pytest.mark.parametrize(("make", "examples"), STUDENTS.values(), ids=STUDENTS)
def test_the_best_model_is_the_one_that_was_saved(tmp_path, make, examples):
    scores = iter([1.0, 3.0, 2.0, 0.0])
    trainer, weights = run(
        tmp_path, make, examples, 0, max_steps=4, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", compute_metrics=lambda prediction: {"score": next(scores)},
    )  # fmt: skip
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert torch.equal(weights_of(trainer.model), weights[1])
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == losses[1] != losses[3]


def test_tied_weights_need_no_second_model_and_stay_tied(tmp_path, monkeypatch):
    make, examples = STUDENTS["gpt2 with tied weights"]
    run(tmp_path, make, examples, 0, max_steps=1)
    checkpoint = str(tmp_path / "checkpoint-1")
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", None)
    trainer, _ = run(tmp_path, make, examples, 5, max_steps=2, resume_from_checkpoint=checkpoint)
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight


def test_a_best_checkpoint_that_is_gone_is_trainers_to_warn_of(tmp_path):
    trainer = DKDTrainer(tiny(ViTForImageClassification), arguments(tmp_path))
    trainer.state.best_model_checkpoint = str(tmp_path / "gone")
    before = weights_of(trainer.model)
    trainer._load_best_model()
    assert torch.equal(weights_of(trainer.model), before)
