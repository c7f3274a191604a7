"""The textbook formula of DKD, as code for it is commonly written: the baseline of the benchmarks."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax


def textbook_dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Algorithm 1 of Zhao et al. with autograd: softmax, masks, log, two KL terms; the mean over all rows.

    Its terms are right where no probability rounds to 0 and no logit comes near 1000: the log of a softmax is -inf
    there, and -1000 no longer hides the target.
    """
    target = torch.zeros_like(student_logits).scatter_(1, labels.unsqueeze(1), 1).bool()
    others = torch.ones_like(student_logits).scatter_(1, labels.unsqueeze(1), 0).bool()
    student = _two_classes(softmax(student_logits / temperature, dim=1), target, others)
    teacher = _two_classes(softmax(teacher_logits / temperature, dim=1), target, others)
    tckd = kl_div(torch.log(student), teacher, reduction="batchmean")
    teacher_others = softmax(teacher_logits / temperature - 1000.0 * target, dim=1)
    student_others = log_softmax(student_logits / temperature - 1000.0 * target, dim=1)
    nckd = kl_div(student_others, teacher_others, reduction="batchmean")
    return temperature**2 * (alpha * tckd + beta * nckd)


def _two_classes(probabilities: Tensor, target: Tensor, others: Tensor) -> Tensor:
    parts = [(probabilities * mask).sum(dim=1, keepdim=True) for mask in (target, others)]
    return torch.cat(parts, dim=1)
