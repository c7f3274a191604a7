"""The trainer's other divisions of the classes: logged under their names, the oracle's gradient, refused where void."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertForTokenClassification, ViTForImageClassification

from hf_dkd import DKDTrainer

from . import oracle
from .trainer_helpers import (
    arguments,
    assert_close,
    first_gradient,
    images,
    labelled_logits,
    logs_of,
    tagged,
    tiny,
    trained,
)

HEADS = [
    pytest.param(ViTForImageClassification, images(4), id="vit"),
    pytest.param(BertForTokenClassification, tagged([6, 0, 2, 3]), id="bert_tokens"),
]
SETTINGS: dict[str, float] = {"dkd_alpha": 0.5, "dkd_beta": 4.0, "dkd_temperature": 2.0, "ce_weight": 0.25}


def by_ranking(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of rows with the teacher's first class, its next, and the other two as groups."""
    ranks = teacher.argsort(1, descending=True).argsort(1)
    between, within, _ = oracle.grouped(student, teacher, torch.tensor([0, 1, 2, 2])[ranks], 3, 2.0)
    return 4 * (0.5 * between + 3 * within[:, 1] + 4 * within[:, 2])


def standardised(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = ((one - one.mean(1, keepdim=True)) / one.std(1, keepdim=True) for one in (student, teacher))
    return oracle.dkd(student, teacher, labels, 0.5, 4.0, 2.0)


OPTIONS: list[Any] = [
    pytest.param({"dkd_top_k": 2, "dkd_top_k_beta": 3.0}, lambda s, t, y: by_ranking(s, t), id="top k"),
    pytest.param({"dkd_standardize": True}, standardised, id="standardised"),
]


@pytest.mark.parametrize(("options", "by_hand"), OPTIONS)
@pytest.mark.parametrize(("model", "examples"), HEADS)
@pytest.mark.parametrize("split", [(4, 1), (1, 4)], ids=["4", "1 × 4"])
def test_the_step_is_the_oracles_however_it_is_split(
    tmp_path: Path, model: Any, examples: Any, options: dict, by_hand: Any, split: tuple[int, int]
) -> None:
    student, teacher = tiny(model, 0), tiny(model, 1)
    logits, labels = labelled_logits(student, examples)
    rows = by_hand(logits, labelled_logits(teacher, examples)[0], labels)
    loss = 0.25 * cross_entropy(logits, labels) + rows.mean()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    student.zero_grad()

    sizes = {"per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]}
    args = arguments(tmp_path, **SETTINGS, **options, **sizes)
    trainer = DKDTrainer(student, args, train_dataset=examples, teacher=teacher)
    assert_close(first_gradient(trainer), expected)
    (entry,) = logs_of(trainer)
    assert (entry["loss"], entry["dkd"]) == pytest.approx((loss.item(), rows.mean().item()), rel=1e-5)
    assert ("top_k" in entry) == ("dkd_top_k" in options)


def test_evaluation_reports_the_top_k(tmp_path: Path) -> None:
    student, teacher = tiny(ViTForImageClassification, 0), tiny(ViTForImageClassification, 1)
    trainer = trained(tmp_path, student, images(4), teacher, dkd_top_k=2, eval_with_teacher=True)
    found = trainer.evaluate(images(6))
    ranks = (logits := labelled_logits(teacher, images(6))[0]).argsort(1, descending=True).argsort(1)
    groups = torch.tensor([0, 1, 2, 2])[ranks]
    between, within, _ = oracle.grouped(labelled_logits(student, images(6))[0], logits, groups, 3)
    expected = {"eval_tckd": between.mean(), "eval_top_k": within[:, 1].mean(), "eval_nckd": within[:, 2].mean()}
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (2, {"dkd_standardize": True}, "at least three classes; got 2"),
        (4, {"dkd_top_k": 4}, "The k of the top k is 4; expected 1 to 3"),
    ],
)
def test_a_division_that_is_none_is_refused(tmp_path: Path, classes: int, options: dict, message: str) -> None:
    student, teacher = (tiny(ViTForImageClassification, seed, num_labels=classes) for seed in (0, 1))
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, student, images(4, classes=classes), teacher, **options)
