"""Distil a text classifier: a GLUE task by name, or any data with one or two text columns and a label column.

    accelerate launch recipes/bert_classification.py

distils a BERT into DistilBERT on six emotions. A teacher of one's own, and a student from its layers:

    accelerate launch recipes/bert_classification.py --task_name mnli --student_model_name_or_path bert-base-uncased \
        --output_dir teacher
    accelerate launch recipes/bert_classification.py --task_name mnli --teacher_model_name_or_path teacher \
        --student_layers 0,3,6,9 --output_dir student

Without a teacher it fine-tunes, which is how to make one. The teacher may have another tokenizer than the student.
"""

from dataclasses import dataclass
from typing import Any

import common
from common import option, parse
from datasets import DatasetDict
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

from hf_dkd import DataCollatorWithTeacherInputs, DKDTrainer, DKDTrainingArguments
from hf_dkd.cache_format import manifest_of
from hf_dkd.metrics import classification_metrics
from hf_dkd.text import tokenized

DATA = "dair-ai/emotion"
STUDENT, TEACHER = "distilbert/distilbert-base-uncased", "bhadresh-savani/bert-base-uncased-emotion"
GLUE = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class TextArguments(common.DataArguments):
    task_name: str | None = option(None, f"A GLUE task: {', '.join(GLUE)}.", choices=list(GLUE))
    text_column_name: str | None = option(None, "Column of texts.")
    text_pair_column_name: str | None = option(None, "Column of second texts, if any.")
    label_column_name: str | None = option(None, "Column of labels.")
    max_seq_length: int = option(128, "Tokens after which texts are cut off.")


@dataclass
class TextTrainingArguments(DKDTrainingArguments):
    output_dir: str = "outputs/bert_classification"
    num_train_epochs: float = 3
    learning_rate: float = 5e-5
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    warmup_steps: float = 0.1
    eval_strategy: str = "epoch"
    logging_steps: float = 50
    save_total_limit: int = 1


ARGUMENTS = (TextArguments, common.StudentArguments, TextTrainingArguments)


def load_texts(data: TextArguments) -> tuple[DatasetDict, list[str]]:
    """Splits of columns text, text_pair (if there are pairs) and labels, and the names of the classes."""
    if data.task_name is not None:
        data.dataset_name, data.dataset_config_name = data.dataset_name or "nyu-mll/glue", data.task_name
        data.text_column_name, data.text_pair_column_name = GLUE[data.task_name]
    splits = common.load_splits(data)
    if manifest_of(splits["train"]):
        return splits, splits["train"].features["labels"].names
    label = common.column(
        splits, data.label_column_name, ("label", "labels", "fine_label", "intent"), "label_column_name"
    )
    splits, names = common.with_class_labels(splits, label)
    columns = {label: "labels"}
    columns[common.column(splits, data.text_column_name, ("text", "sentence", "sentence1"), "text_column_name")] = (
        "text"
    )
    if data.text_pair_column_name is not None or "sentence2" in splits["train"].column_names:
        columns[common.column(splits, data.text_pair_column_name, ("sentence2",), "text_pair_column_name")] = (
            "text_pair"
        )
    return splits.select_columns(list(columns)).rename_columns(columns), names


def build(
    data: TextArguments, student: common.StudentArguments, args: TextTrainingArguments
) -> tuple[Any, DatasetDict]:
    set_seed(args.seed)
    if not (data.dataset_name or data.train_file or data.task_name):
        data.dataset_name = DATA
        if not (student.student_model_name_or_path or student.student_model_type or args.teacher_model_name_or_path):
            student.student_model_name_or_path, args.teacher_model_name_or_path = STUDENT, TEACHER
    splits, names = load_texts(data)
    teacher = args.teacher_model_name_or_path
    tokenizer = common.load_tokenizer(student.student_model_name_or_path or teacher, "student")
    collator: Any = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    tokenizers = {"": tokenizer}
    if teacher is not None:
        teacher_tokenizer = common.load_tokenizer(teacher, "teacher")
        if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
            tokenizers["teacher_"] = teacher_tokenizer
            teacher_collator = DataCollatorWithPadding(teacher_tokenizer, pad_to_multiple_of=8)
            collator = DataCollatorWithTeacherInputs(collator, teacher_collator)

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        texts = (rows["text"], rows["text_pair"]) if "text_pair" in rows else (rows["text"],)
        encoded = {
            prefix + name: values
            for prefix, one in tokenizers.items()
            for name, values in one(*texts, truncation=True, max_length=data.max_seq_length).items()
        }
        return encoded | {"labels": rows["labels"]}

    splits = tokenized(splits, args, tokenize)
    model = common.load_student(AutoModelForSequenceClassification, student, teacher, names)
    with common.loading("teacher", teacher):
        trainer = DKDTrainer(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            compute_metrics=classification_metrics,
        )
    return trainer, splits


def main() -> None:
    data, student, args, settings = parse(*ARGUMENTS)
    trainer, splits = build(data, student, args)
    common.run(
        trainer,
        splits,
        settings,
        primary="matthews_correlation" if data.task_name == "cola" else "accuracy",  # as GLUE counts
        tasks="text-classification",
        dataset=data.dataset_name or data.train_file,
    )


if __name__ == "__main__":
    main()
