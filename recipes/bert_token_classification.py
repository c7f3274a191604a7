"""Distil a tagger of words, such as for named entities: by default a BERT into DistilBERT on CoNLL-2003.

    accelerate launch recipes/bert_token_classification.py

A teacher of one's own, and a student from its layers:

    accelerate launch recipes/bert_token_classification.py --dataset_name FOLDER --output_dir teacher \
        --student_model_name_or_path google-bert/bert-base-cased
    accelerate launch recipes/bert_token_classification.py --dataset_name FOLDER --output_dir student \
        --teacher_model_name_or_path teacher --student_layers 0,3,6,9

Without a teacher it fine-tunes, which is how to make one. Each row of the data has a list of words and one of tags.
The first subword of each word carries its tag, so that teacher and student must have the same tokenizer: take a student
of the teacher's family, or from its layers, `--student_layers 0,3,6,9`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import common
from common import fail, option, parse
from datasets import ClassLabel, DatasetDict, LargeList, List
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, set_seed

from hf_dkd import DKDTrainer, DKDTrainingArguments
from hf_dkd.metrics import tag_columns, tagging_metrics
from hf_dkd.text import continued, subword_labels, tokenized

STUDENT, TEACHER = "distilbert/distilbert-base-cased", "dslim/bert-base-NER"
CONLL, CONLL_TAGS = "lhoestq/conll2003", "O,B-PER,I-PER,B-ORG,I-ORG,B-LOC,I-LOC,B-MISC,I-MISC"


@dataclass
class TaggingArguments(common.DataArguments):
    dataset_name: str | None = option(CONLL, "Hub id, or a folder of parquet or JSON files.")
    tokens_column_name: str | None = option(None, "Column of lists of words.")
    tags_column_name: str | None = option(None, "Column of lists of tags.")
    tag_names: str | None = option(None, "Names of the tags, where the data only numbers them from 0: 'O,B-PER,…'.")
    max_seq_length: int = option(256, "Subwords after which texts are cut off; the rest is not evaluated.")
    label_all_subwords: bool = option(False, "Train on every subword of a word; evaluation takes the first.")


@dataclass
class TaggingTrainingArguments(DKDTrainingArguments):
    output_dir: str = "outputs/bert_token_classification"
    num_train_epochs: float = 3
    learning_rate: float = 5e-5
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    warmup_steps: float = 0.1
    eval_strategy: str = "epoch"
    logging_steps: float = 50
    save_total_limit: int = 1


ARGUMENTS = (TaggingArguments, common.StudentArguments, TaggingTrainingArguments)


def load_tagged_texts(data: TaggingArguments) -> tuple[DatasetDict, list[str]]:
    """Splits of columns tokens and tags, numbered, and the names of the tags."""
    usual = {"tokens": ("tokens", "words"), "tags": ("ner_tags", "tags", "labels")}
    splits = common.select_columns(common.load_splits(data), data, usual)
    for name, feature in splits["train"].features.items():
        if not isinstance(feature, List | LargeList):
            fail(f"the {name} are no lists but {feature}: each row has a list of words and a list of their tags.")
    kind = splits["train"].features["tags"].feature
    if isinstance(kind, ClassLabel):
        return splits, kind.names
    if kind.dtype in ("string", "large_string"):
        names = sorted({tag for tags in splits["train"]["tags"] for tag in tags})
    elif data.tag_names is None:
        fail("the tags are numbers: name them with --tag_names O,B-PER,…")
    else:
        names = data.tag_names.split(",")
    try:
        return splits.cast_column("tags", List(ClassLabel(names=names))), names
    except ValueError as error:
        fail(f"the tags: {error}; the training split, or --tag_names, must have every tag.")


def load_tokenizers(student: str | None, teacher: str | None, texts: list[list[str]]) -> Any:
    """The student's tokenizer, which must split `texts` as the teacher's does: tags stand at the same subwords."""
    # For the byte-level tokenizers, such as RoBERTa's: a word is then the same at the start of a text as within it.
    tokenizer = common.load_tokenizer(student or teacher, "student", add_prefix_space=True)
    if teacher is not None:
        other = common.load_tokenizer(teacher, "teacher", add_prefix_space=True)
        ids, other_ids = (one(texts, is_split_into_words=True)["input_ids"] for one in (tokenizer, other))
        if ids != other_ids or tokenizer.get_vocab() != other.get_vocab():
            fail(
                f"the tokenizers of teacher ({len(other)} subwords) and student ({len(tokenizer)}) differ, but tags "
                "must stand at the same: take a student of the teacher's family or --student_layers."
            )
    return tokenizer


def build(
    data: TaggingArguments, student: common.StudentArguments, args: TaggingTrainingArguments
) -> tuple[Any, DatasetDict]:
    set_seed(args.seed)
    by_default = data.dataset_name == CONLL and data.train_file is None
    data.tag_names = data.tag_names or (CONLL_TAGS if by_default else None)
    splits, names = load_tagged_texts(data)
    if not (student.student_model_name_or_path or student.student_model_type or student.student_layers):
        student.student_model_name_or_path = STUDENT
        args.teacher_model_name_or_path = args.teacher_model_name_or_path or (TEACHER if by_default else None)
    teacher = args.teacher_model_name_or_path
    tokenizer = load_tokenizers(student.student_model_name_or_path, teacher, splits["train"][:100]["tokens"])

    def tokenize(rows: dict[str, list], later: list[int] | None) -> dict[str, list]:
        encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=data.max_seq_length)
        for tokens, tags in zip(rows["tokens"], rows["tags"], strict=True):
            if len(tokens) != len(tags) or not all(0 <= tag < len(names) for tag in tags):
                fail(f"{len(tokens)} words have the tags {tags}; expected one each, from 0 to {len(names) - 1}.")
        labels = [subword_labels(encoded.word_ids(row), tags, later) for row, tags in enumerate(rows["tags"])]
        return {**encoded, "labels": labels}

    for name, split in splits.items():
        later = continued(names) if data.label_all_subwords and name == "train" else None
        splits[name] = tokenized(split, args, tokenize, later=later)
    model = common.load_student(AutoModelForTokenClassification, student, teacher, names)
    with common.loading("teacher", teacher):
        trainer = DKDTrainer(
            model=model,
            args=args,
            data_collator=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            compute_metrics=partial(tagging_metrics, names),
        )
    return trainer, splits


def main() -> None:
    data, student, args, settings = parse(*ARGUMENTS)
    trainer, splits = build(data, student, args)
    common.run(
        trainer,
        splits,
        settings,
        primary="f1",
        table=partial(tag_columns, list(trainer.model.config.id2label.values())),
        tasks="token-classification",
        dataset=data.train_file or data.dataset_name,
    )


if __name__ == "__main__":
    main()
