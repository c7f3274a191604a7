"""Mean KL divergence from the teacher to the student, KL(teacher ‖ student), in nats."""

import datasets
import evaluate
import torch

from hf_dkd.losses import kd_loss


class TeacherKL(evaluate.Metric):
    """`compute(predictions=student's logits (N, C), references=teacher's (N, C), temperature=1.0)` → `{"teacher_kl"}`.

    Computed in float64 at the temperature given, and not multiplied by its square.
    """

    def _info(self) -> evaluate.MetricInfo:
        logits = {name: datasets.List(datasets.Value("float64")) for name in ("predictions", "references")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(logits))

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], temperature: float = 1.0
    ) -> dict[str, float]:
        student, teacher = (torch.tensor(logits, dtype=torch.float64) for logits in (predictions, references))
        return {"teacher_kl": kd_loss(student, teacher, temperature=temperature).item() / temperature**2}
