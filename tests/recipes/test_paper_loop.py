"""A whole training of the paper's benchmark beside the same training written as a plain loop."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from .image_assets import save_parquet
from .launching import built

EPOCHS = 24  # a tenth of the paper's: milestones at 15, 18 and 21, weights of 1/2 and 1


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, beta: float, temperature: float = 4.0) -> Tensor:
    """Equations 5 to 7 of the paper with α = 1, of probabilities, a row at a time."""
    losses = []
    for s, t, label in zip(softmax(student / temperature, 1), softmax(teacher / temperature, 1), labels, strict=True):
        rest = torch.arange(len(s)) != label
        tckd = t[label] * (t[label] / s[label]).log() + (1 - t[label]) * ((1 - t[label]) / (1 - s[label])).log()
        q_t, q_s = t[rest] / t[rest].sum(), s[rest] / s[rest].sum()
        losses.append(tckd + beta * (q_t * (q_t / q_s).log()).sum())
    return temperature**2 * torch.stack(losses).mean()


def test_a_whole_run_ends_where_a_plain_loop_ends(tmp_path: Path) -> None:
    files = {f"{split}_file": str(path) for split, path in save_parquet(tmp_path / "digits").items()}
    settings: dict[str, Any] = {"image_size": 16, "max_train_samples": 24, "per_device_train_batch_size": 16}
    settings |= {"pair": "resnet20-resnet8", "num_train_epochs": EPOCHS, "teacher_epochs": 1}
    settings |= {"teacher_model_name_or_path": tmp_path / "teacher", "output_dir": tmp_path / "out"}
    trainer, _ = built("paper_cifar100", **files, **settings, max_eval_samples=8)
    # In float64, in which two correct trainings do not part.
    student, teacher = trainer.model.double(), trainer.teacher.model.double()
    start = {name: value.clone() for name, value in student.state_dict().items()}
    batches: list[dict[str, Tensor]] = []

    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batches.append({name: value.double() if name == "pixel_values" else value for name, value in batch.items()})
        return batches[-1].copy()

    trainer.data_collator, trainer.args.eval_strategy = collate, "no"
    trainer.train()
    ours = {name: value.clone() for name, value in student.state_dict().items()}
    assert [len(batch["labels"]) for batch in batches] == EPOCHS * [16, 8]

    student.load_state_dict(start)
    student.train()
    velocity = {name: torch.zeros_like(value) for name, value in student.named_parameters()}
    for number, batch in enumerate(batches):
        epoch = number // 2 + 1
        rate = 0.05 * 0.1 ** sum(epoch > milestone for milestone in (15, 18, 21))
        with torch.no_grad():
            taught = teacher(batch["pixel_values"]).logits
        logits, labels = student(batch["pixel_values"]).logits, batch["labels"]
        loss = cross_entropy(logits, labels) + min(1, epoch / 2) * dkd(logits, taught, labels, beta=2)
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, value in student.named_parameters():
                velocity[name] = 0.9 * velocity[name] + value.grad + 5e-4 * value
                value -= rate * velocity[name]
    for name, value in student.state_dict().items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-9, msg=name)
