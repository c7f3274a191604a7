"""`evaluate` modules that load without a network: `Accuracy().compute(predictions=…, references=…)`.

Each file also loads by its path, `evaluate.load("…/hf_dkd/metrics/accuracy.py")`. They need `pip install
"hf-dkd[metrics]"` and, but for `hf_dkd.figures`, are imported by nothing else in the package.
"""

from .accuracy import Accuracy
from .calibration import ExpectedCalibrationError, reliability
from .classification import classification_metrics
from .entity_f1 import EntityF1
from .f1 import F1
from .language import TOKEN_SCORES, language_metrics, token_scores
from .matthews import MatthewsCorrelation
from .predictions import class_columns, metric_of_predictions, score_columns, tag_columns
from .rouge import Rouge
from .sacrebleu import SacreBLEU
from .tagging import tag_lists, tagging_metrics
from .teacher_agreement import TeacherAgreement
from .teacher_kl import TeacherKL
from .top_k_accuracy import TopKAccuracy

__all__ = [
    "F1",
    "TOKEN_SCORES",
    "Accuracy",
    "EntityF1",
    "ExpectedCalibrationError",
    "MatthewsCorrelation",
    "Rouge",
    "SacreBLEU",
    "TeacherAgreement",
    "TeacherKL",
    "TopKAccuracy",
    "class_columns",
    "classification_metrics",
    "language_metrics",
    "metric_of_predictions",
    "reliability",
    "score_columns",
    "tag_columns",
    "tag_lists",
    "tagging_metrics",
    "token_scores",
]
