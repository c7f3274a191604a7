"""The pairs of models and the settings of Zhao et al., Decoupled Knowledge Distillation (CVPR 2022), and its figures.

Settings are those of the authors' code (megvii-research/mdistiller, configs). Accuracies are in per cent, on the test
set. Those of DKD are of the best epoch, means over 5 runs (ImageNet: 3); the others on CIFAR-100 were taken over from
the authors of the benchmark (HobbitLong/RepDistiller), who report the last epoch.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Schedule(NamedTuple):
    """What the pairs of a data set have in common."""

    epochs: float
    batch_size: int
    weight_decay: float
    milestones: tuple[float, ...]
    """Shares of the training after which the learning rate falls to a tenth."""
    temperature: float
    warmup_epochs: float
    kd: dict[str, float]
    """Weights of cross-entropy and KL in classical distillation."""


CIFAR = Schedule(240, 64, 5e-4, (150 / 240, 180 / 240, 210 / 240), 4.0, 20, {"ce_weight": 0.1, "dkd_alpha": 0.9})
IMAGENET = Schedule(100, 512, 1e-4, (0.3, 0.6, 0.9), 1.0, 1, {"ce_weight": 0.5, "dkd_alpha": 0.5})


# Of all teachers that are trained here, whatever their students take.
TEACHER_LEARNING_RATE = 0.05


class Pair(NamedTuple):
    """A teacher, a student, the pair's own settings, and the accuracies that the paper reports, if it does."""

    teacher: str
    student: str
    beta: float
    learning_rate: float
    accuracy: Mapping[str, float] = MappingProxyType({})
    """Of the teacher, and of the student by method."""
    reruns: str = ""
    """What others reached with DKD, also in the threads of mdistiller (issues 7, 8 and 51)."""
    schedule: Schedule = CIFAR


def reported(teacher: float, student: float, kd: float, dkd: float) -> dict[str, float]:
    """The paper's accuracies of a pair: its teacher's, and the student's on labels alone, with KD and with DKD."""
    return {"teacher": teacher, "cross-entropy": student, "kd": kd, "dkd": dkd}


_PAIRS = (
    Pair("resnet56", "resnet20", 2, 0.05, reported(72.34, 69.06, 70.66, 71.97)),
    Pair("resnet110", "resnet32", 2, 0.05, reported(74.31, 71.14, 73.08, 74.11)),
    Pair("resnet32x4", "resnet8x4", 8, 0.05, reported(79.42, 72.50, 73.33, 76.32), "75.4–76.3"),
    Pair("wrn_40_2", "wrn_16_2", 6, 0.05, reported(75.61, 73.26, 74.92, 76.24), "75.2–75.5"),
    Pair("wrn_40_2", "wrn_40_1", 6, 0.05, reported(75.61, 71.98, 73.54, 74.81), "73.3"),
    Pair("vgg13", "vgg8", 6, 0.05, reported(74.64, 70.36, 72.98, 74.68)),
    Pair("resnet32x4", "shufflenet_v1", 8, 0.01, reported(79.42, 70.50, 74.07, 76.45)),
    Pair("wrn_40_2", "shufflenet_v1", 8, 0.01, reported(75.61, 70.50, 74.83, 76.70)),
    Pair("vgg13", "mobilenet_v2", 6, 0.01, reported(74.64, 64.60, 67.37, 69.71)),
    Pair("resnet50", "mobilenet_v2", 8, 0.01, reported(79.34, 64.60, 67.35, 70.35)),
    Pair("resnet32x4", "shufflenet_v2", 8, 0.01, reported(79.42, 71.82, 74.45, 77.07)),
    # The Hub's teachers are not the paper's, whose accuracies these are.
    Pair("microsoft/resnet-34", "resnet18", 0.5, 0.2, reported(73.31, 69.75, 70.66, 71.70), schedule=IMAGENET),
    Pair("microsoft/resnet-50", "mobilenet_v1", 2, 0.2, reported(76.16, 68.87, 68.58, 72.05), schedule=IMAGENET),
    # Not the paper's: for a processor, at --image_size 16.
    Pair("resnet20", "resnet8", 2, 0.05),
)
PAIRS = {f"{pair.teacher}-{pair.student}".replace("microsoft/resnet-", "resnet"): pair for pair in _PAIRS}
DEFAULT_PAIR = "resnet32x4-resnet8x4"
# Students on ImageNet: model type and config. (MobileNetV1's own dropout would leave a thousandth of the features.)
IMAGENET_STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet", {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}),
    "mobilenet_v1": (
        "mobilenet_v1",
        {"classifier_dropout_prob": 0.0, "tf_padding": False, "layer_norm_eps": 1e-5, "hidden_act": "relu"},
    ),
}


def published(pair: str, distillation: str, epochs: float, kd_warmup: bool = False) -> dict[str, float]:
    """The paper's settings of a pair, for a schedule of so many epochs; with `kd_warmup` kd has DKD's warm-up."""
    schedule, kd = PAIRS[pair].schedule, distillation == "kd"
    return {
        "learning_rate": PAIRS[pair].learning_rate,
        "weight_decay": schedule.weight_decay,
        "per_device_train_batch_size": schedule.batch_size // int(os.environ.get("WORLD_SIZE", "1")),
        "ce_weight": schedule.kd["ce_weight"] if kd else 1.0,
        "dkd_alpha": schedule.kd["dkd_alpha"] if kd else 1.0,
        "dkd_beta": 1.0 if kd else PAIRS[pair].beta,
        "dkd_temperature": schedule.temperature,
        "dkd_warmup_epochs": 0.0 if kd and not kd_warmup else schedule.warmup_epochs * epochs / schedule.epochs,
    }
