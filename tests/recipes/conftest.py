"""A text classification task and a teacher for it, made once for all tests of recipes."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification

from .launching import launch
from .text_assets import save_tiny_bert, sentences, write_csv


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for a training and a test file, without a validation split."""
    folder = tmp_path_factory.mktemp("text_data")
    return {
        "train_file": write_csv(folder / "train.csv", sentences(240, seed=0)),
        "test_file": write_csv(folder / "test.csv", sentences(60, seed=1)),
        "validation_share": 0.25,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
    }


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has not been trained."""
    return save_tiny_bert(tmp_path_factory.mktemp("text_base"), BertForSequenceClassification)


@pytest.fixture(scope="session")
def text_teacher(text_data: dict[str, Any], text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model fine-tuned by the recipe for text classification."""
    output = tmp_path_factory.mktemp("text_teacher")
    recipe, settings = "bert_classification.py", {"student_model_name_or_path": text_base, "num_train_epochs": 24}
    launch(recipe, **text_data, **settings, output_dir=output)
    return output
