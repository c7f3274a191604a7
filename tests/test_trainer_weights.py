"""Several labels an example and mixed ones in the trainer: the oracle's gradient, and which kind numbers are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from transformers import (
    BertForSequenceClassification,
    Trainer,
    ViTForImageClassification,
    default_data_collator,
)

from hf_dkd import DataCollatorForMixup, DKDMixin, DKDTrainer

from . import oracle
from .trainer_helpers import (
    all_logits,
    arguments,
    assert_close,
    first_gradient,
    forwards,
    images,
    logs_of,
    sentences,
    tiny,
    trained,
)

SETTINGS: dict[str, float] = {"dkd_alpha": 0.5, "dkd_beta": 4.0, "dkd_temperature": 2.0, "ce_weight": 0.25}


# ---- Several labels an example, and mixed ones ----


def with_weights(examples: list[dict[str, Any]], weights: Tensor) -> list[dict[str, Any]]:
    return [example | {"labels": row} for example, row in zip(examples, weights, strict=True)]


SEVERAL = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]])
MIXED = torch.tensor([[0.3, 0, 0.7, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.1, 0.9]])
SPLITS = pytest.mark.parametrize("split", [(4, 1), (1, 4), (3, 2)], ids=["4", "1 × 4", "3 + 1"])


def step(
    path: Path, model: Any, examples: Any, loss: Any, split: tuple[int, int], config: dict, **options: Any
) -> dict[str, float]:
    """Train one step, compare its gradient with that of `loss(student logits, teacher logits)`; what was logged."""
    student, teacher = (tiny(model, seed, **config) for seed in (0, 1))
    loss(all_logits(student, examples), all_logits(teacher, examples).detach()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    student.zero_grad()
    sizes = {"per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]}
    args = arguments(path, **SETTINGS | options | sizes)
    trainer = DKDTrainer(student, args, train_dataset=examples, teacher=teacher)
    assert_close(first_gradient(trainer), expected)
    return logs_of(trainer)[0]


@SPLITS
@pytest.mark.parametrize("model", [ViTForImageClassification, BertForSequenceClassification])
@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_each_of_several_labels_is_a_two_class_problem(
    tmp_path: Path, model: Any, problem: str | None, split: tuple[int, int]
) -> None:
    examples = with_weights(images(4) if model is ViTForImageClassification else sentences(4), SEVERAL)
    found: dict[str, Tensor] = {}

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        found["tckd"], found["agreement"] = kl.mean(), ((student > 0) == (teacher > 0)).double().mean()
        return 0.25 * binary_cross_entropy_with_logits(student, SEVERAL.double()) + 4 * 0.5 * kl.mean()

    entry = step(tmp_path, model, examples, loss, split, {"problem_type": problem})
    assert (entry["tckd"], entry["nckd"]) == (pytest.approx(found["tckd"].item(), rel=1e-5), 0)
    assert entry["teacher_agreement"] == pytest.approx(found["agreement"].item())


def test_several_labels_are_said_to_have_no_nckd_and_are_evaluated(tmp_path: Path, caplog: Any) -> None:
    config = {"problem_type": "multi_label_classification"}
    student, teacher = (tiny(ViTForImageClassification, seed, **config) for seed in (0, 1))
    trainer = trained(tmp_path, student, with_weights(images(4), SEVERAL), teacher, eval_with_teacher=True)
    assert caplog.text.count("Several labels per example, each a two-class problem: NCKD is 0") == 1
    found = trainer.evaluate(with_weights(images(4), SEVERAL))
    decisions = all_logits(teacher, images(4)) > 0
    assert found["eval_teacher_accuracy"] == pytest.approx((decisions == SEVERAL.bool()).double().mean().item())
    expected = binary_cross_entropy_with_logits(all_logits(student, images(4)), SEVERAL.double())
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"dkd_top_k": 3}, {"dkd_standardize": True}])
def test_several_labels_have_nothing_to_rank_or_to_standardise(tmp_path: Path, options: dict) -> None:
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
    with pytest.raises(ValueError, match=f"{next(iter(options))} is set for a multi-label head"):
        trained(tmp_path, student, with_weights(images(4), SEVERAL), teacher, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("distillation", ["dkd", "kd"])
@SPLITS
def test_mixed_examples_have_each_class_alone_and_the_rest(
    tmp_path: Path, split: tuple[int, int], distillation: str, smoothing: float
) -> None:
    groups = torch.tensor([[1, 2, 0, 2], [2, 0, 2, 2], [2, 0, 1, 2], [2, 2, 1, 0]])
    found: dict[str, Tensor] = {}

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        between, within, _ = oracle.grouped(student, teacher, groups, 3, 2.0)
        hard = cross_entropy(student, MIXED.double(), label_smoothing=smoothing)
        kl = oracle.grouped(student, teacher, torch.zeros_like(groups), 1, 2.0)[1][:, 0]
        rows = 0.5 * between + 4 * within[:, 2] if distillation == "dkd" else 0.5 * kl
        found.update(ce=hard, tckd=between.mean(), nckd=within[:, 2].mean(), dkd=4 * rows.mean())
        return 0.25 * hard + 4 * rows.mean()

    options: dict[str, Any] = {"distillation": distillation, "label_smoothing_factor": smoothing}
    options |= {"dkd_beta": 1.0} if distillation == "kd" else {}
    config = {"problem_type": "single_label_classification"}
    examples = with_weights(images(4), MIXED)
    entry = step(tmp_path, ViTForImageClassification, examples, loss, split, config, **options)
    assert {name: entry[name] for name in found} == pytest.approx(
        {name: value.item() for name, value in found.items()}, rel=1e-5
    )


def test_examples_of_one_class_each_are_those_with_labels(tmp_path: Path) -> None:
    entries = []
    for weights in (False, True):
        student, teacher = (
            tiny(ViTForImageClassification, seed, problem_type="single_label_classification") for seed in (0, 1)
        )
        examples = images(4)
        if weights:
            examples = with_weights(examples, one_hot(torch.tensor([one["labels"] for one in examples]), 4).float())
        entries.append(logs_of(trained(tmp_path, student, examples, teacher))[0])
    assert entries[0] == pytest.approx(entries[1], rel=1e-6)


def test_mixed_examples_train_without_a_teacher_and_are_evaluated(tmp_path: Path) -> None:
    student = tiny(ViTForImageClassification, 0, problem_type="single_label_classification")
    expected = cross_entropy(all_logits(student, images(4)), MIXED.double())
    examples = with_weights(images(4), MIXED)
    trainer = DKDTrainer(student, arguments(tmp_path), train_dataset=examples)
    assert trainer.evaluate(examples)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert logs_of(trainer)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_smoothed_mixed_labels_are_refused(tmp_path: Path) -> None:
    student, teacher = (
        tiny(ViTForImageClassification, seed, problem_type="single_label_classification") for seed in (0, 1)
    )
    with pytest.raises(ValueError, match="Leave smoothing to the hard-label loss: label_smoothing_factor"):
        trained(tmp_path, student, with_weights(images(4), 0.9 * MIXED + 0.025), teacher)


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_the_collator_mixes_training_batches_alone(tmp_path: Path, mixup: float) -> None:
    student, teacher = (
        tiny(ViTForImageClassification, seed, problem_type="single_label_classification") for seed in (0, 1)
    )
    collator = DataCollatorForMixup(default_data_collator, num_classes=4, mixup_alpha=mixup)
    seen, taught = forwards(student), forwards(teacher)
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = DKDTrainer(student, args, data_collator=collator, train_dataset=images(4), teacher=teacher)
    trainer.train()
    mixed = collator.for_training(images(4))
    for calls in (seen, taught):
        torch.testing.assert_close(calls[0]["pixel_values"], mixed["pixel_values"])
    assert not torch.equal(mixed["pixel_values"], default_data_collator(images(4))["pixel_values"])
    expected = cross_entropy(
        all_logits(tiny(ViTForImageClassification, 0), with_pixels(mixed)), mixed["labels"].double()
    )
    assert logs_of(trainer)[0]["ce"] == pytest.approx(expected.item(), rel=1e-5)
    found = trainer.evaluate(images(4))["eval_loss"]
    labels = default_data_collator(images(4))["labels"]
    assert found == pytest.approx(cross_entropy(all_logits(student, images(4)), labels).item(), rel=1e-5)


def with_pixels(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{"pixel_values": image} for image in batch["pixel_values"]]


# ---- Which kind the numbers of an example are ----


def test_without_a_teacher_labels_are_what_the_script_makes_of_them(tmp_path: Path) -> None:
    """Numbers for each class with a loss function of the script's own, and two class indices an example."""

    def squares(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return (outputs["logits"][:, : labels.shape[1]] - labels).square().mean() / 2

    for labels in (torch.rand(4, 4), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])):
        logs = []
        for trainer_class in (Trainer, DKDTrainer):
            student = tiny(ViTForImageClassification, 0)
            sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
            given = {"train_dataset": with_weights(images(4), labels), "compute_loss_func": squares}
            trainer = trainer_class(student, arguments(tmp_path, **sizes), **given)
            trainer.train()
            logs.append(logs_of(trainer)[0]["loss"])
            assert student.config.problem_type is None
        assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_shares_are_not_taken_for_several_labels(tmp_path: Path) -> None:
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
    with pytest.raises(ValueError, match="not all of them 0 or 1, and"):
        trained(tmp_path, student, with_weights(images(4), MIXED), teacher)
    collator = DataCollatorForMixup(default_data_collator, num_classes=4)
    trainer = DKDTrainer(student, arguments(tmp_path), data_collator=collator, train_dataset=images(4), teacher=teacher)
    with pytest.raises(ValueError, match="The collator mixes examples and the student's"):
        trainer.train()


@pytest.mark.parametrize(
    ("told", "problem"),
    [("classification", "multi_label_classification"), ("multi_label", "single_label_classification")],
)
def test_two_kinds_at_once_are_refused(tmp_path: Path, told: str, problem: str) -> None:
    student, teacher = (tiny(ViTForImageClassification, seed, problem_type=problem) for seed in (0, 1))
    with pytest.raises(ValueError, match=f"dkd_head is '{told}' and the student's config.problem_type '{problem}'"):
        DKDTrainer(student, arguments(tmp_path, dkd_head=told), teacher=teacher)


@pytest.mark.parametrize("problem", ["multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize("taught", [True, False])
def test_an_own_loss_function_gets_the_count_that_trainer_gives(tmp_path: Path, problem: str, taught: bool) -> None:
    counts = {}
    weights = SEVERAL if problem.startswith("multi") else MIXED
    for trainer_class in (Trainer, DKDTrainer):
        seen = counts.setdefault(trainer_class, [])

        def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, seen: Any = seen) -> Tensor:
            seen.append(int(num_items_in_batch))
            return binary_cross_entropy_with_logits(outputs["logits"], labels, reduction="sum") / num_items_in_batch

        student, teacher = (tiny(ViTForImageClassification, seed, problem_type=problem) for seed in (0, 1))
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        given = {"teacher": teacher} if taught and trainer_class is DKDTrainer else {}
        trainer = trainer_class(
            student, arguments(tmp_path, **sizes), train_dataset=with_weights(images(4), weights),
            compute_loss_func=own, **given,
        )  # fmt: skip
        trainer.train()
        trainer.evaluate(with_weights(images(4), weights))
    assert counts[DKDTrainer] == counts[Trainer] == [16, 16, 16]


def test_the_loss_of_a_parent_trainer_is_the_hard_term_of_mixed_examples(tmp_path: Path) -> None:
    class Parent(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(pixel_values=inputs["pixel_values"])
            loss = 3 * cross_entropy(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    class Child(DKDMixin, Parent):
        pass

    student, teacher = (
        tiny(ViTForImageClassification, seed, problem_type="single_label_classification") for seed in (0, 1)
    )
    expected = 3 * cross_entropy(all_logits(student, images(4)), MIXED.double())
    trainer = Child(student, arguments(tmp_path), train_dataset=with_weights(images(4), MIXED), teacher=teacher)
    trainer.train()
    assert logs_of(trainer)[0]["ce"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_plain_module_of_several_labels_needs_no_config(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 4)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.linear(pixel_values.flatten(1))
            loss = {} if labels is None else {"loss": binary_cross_entropy_with_logits(logits, labels)}
            return {**loss, "logits": logits}

    torch.manual_seed(0)
    student, teacher = Plain(), Plain()
    examples = with_weights(images(4), SEVERAL)
    p, q = (
        one.linear(torch.stack([example["pixel_values"] for example in examples]).flatten(1)).double().sigmoid()
        for one in (teacher, student)
    )
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    (entry,) = logs_of(trained(tmp_path, student, examples, teacher, dkd_head="multi_label"))
    assert entry["tckd"] == pytest.approx(kl.mean().item(), rel=1e-5)
