"""Distil a translation or summarisation model, of any encoder-decoder family such as T5, BART or Marian.

    accelerate launch recipes/seq2seq.py --student_model_name_or_path google-t5/t5-base --output_dir teacher
    accelerate launch recipes/seq2seq.py --student_model_name_or_path google-t5/t5-small \
        --teacher_model_name_or_path teacher --output_dir student

Without a teacher it fine-tunes, which is how to make one; teacher and student share a tokenizer. With no option at all
it distils T5-Base into T5-Small. Its data are translations of books, unless you name other data: with `--source_lang en
--target_lang de --source_prefix "translate English to German: "` translations again, without languages summaries.
"""

from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from common import option, parse
from datasets import DatasetDict
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, EvalPrediction, set_seed

from hf_dkd import DKDSeq2SeqTrainer, DKDSeq2SeqTrainingArguments
from hf_dkd.metrics import Rouge, SacreBLEU
from hf_dkd.text import tokenized

SOURCES, TARGETS = ("document", "article", "dialogue", "text", "source"), ("summary", "highlights", "target")


@dataclass
class PairArguments(common.DataArguments):
    source_lang: str | None = option(None, "Translate from this language: 'en', in columns or a 'translation' column.")
    target_lang: str | None = option(None, "Translate to this language: 'fr'.")
    source_column_name: str | None = option(None, "Column of texts to read.")
    target_column_name: str | None = option(None, "Column of texts to write.")
    source_prefix: str = option("", "Put before every text to read, as T5 wants: 'summarize: '.")
    max_source_length: int = option(512, "Tokens after which texts to read are cut off.")
    max_target_length: int = option(128, "The same for texts to write, the references of the metrics too.")


@dataclass
class GenerationTrainingArguments(DKDSeq2SeqTrainingArguments):
    output_dir: str = "outputs/seq2seq"
    predict_with_generate: bool = True
    num_train_epochs: float = 3
    learning_rate: float = 3e-4
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16
    warmup_steps: float = 0.05
    eval_strategy: str = "epoch"
    logging_steps: float = 50
    save_total_limit: int = 1


ARGUMENTS = (PairArguments, common.StudentArguments, GenerationTrainingArguments)


def load_pairs(data: PairArguments) -> DatasetDict:
    """Splits of the columns source and target."""
    if data.dataset_name is None and data.train_file is None:
        data.dataset_name, data.dataset_config_name = "Helsinki-NLP/opus_books", "en-fr"
        data.source_lang, data.target_lang, data.source_prefix = "en", "fr", "translate English to French: "
    # A column of {"en": …, "fr": …} becomes the columns translation.en and translation.fr.
    splits = common.load_splits(data).flatten()
    usual = {"source": SOURCES, "target": TARGETS}
    for name, lang in (("source", data.source_lang), ("target", data.target_lang)):
        if lang is not None:
            usual[name] = (f"translation.{lang}", lang)
    return common.select_columns(splits, data, usual)


def decode(tokenizer: Any, ids: Any) -> list[str]:
    """The texts of rows of token ids, which -100 fills up."""
    return [text.strip() for text in tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), True)]


def build(
    data: PairArguments, student: common.StudentArguments, args: GenerationTrainingArguments
) -> tuple[Any, DatasetDict]:
    set_seed(args.seed)
    if not (student.student_model_name_or_path or student.student_model_type or args.teacher_model_name_or_path):
        student.student_model_name_or_path = "google-t5/t5-small"
        args.teacher_model_name_or_path = "google-t5/t5-base"
    args.generation_max_length = args.generation_max_length or data.max_target_length
    teacher = args.teacher_model_name_or_path
    splits = load_pairs(data)
    tokenizer = common.load_shared_tokenizer(student.student_model_name_or_path, teacher)

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        sources = [data.source_prefix + (text or "") for text in rows["source"]]
        inputs = tokenizer(sources, max_length=data.max_source_length, truncation=True)
        targets = [text or "" for text in rows["target"]]
        labels = tokenizer(text_target=targets, max_length=data.max_target_length, truncation=True)
        return {"input_ids": inputs["input_ids"], "labels": labels["input_ids"]}

    def generation_metrics(prediction: EvalPrediction) -> dict[str, float]:
        texts = {
            "predictions": decode(tokenizer, prediction.predictions),
            "references": decode(tokenizer, prediction.label_ids),
        }
        return SacreBLEU().compute(**texts) | Rouge().compute(**texts)

    splits = tokenized(splits, args, tokenize)
    model = common.load_student(AutoModelForSeq2SeqLM, student, teacher)
    with common.loading("teacher", teacher):
        trainer = DKDSeq2SeqTrainer(
            model=model,
            args=args,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            compute_metrics=generation_metrics,
        )
    return trainer, splits


def main() -> None:
    data, student, args, settings = parse(*ARGUMENTS)
    trainer, splits = build(data, student, args)
    tokenizer = trainer.processing_class
    common.run(
        trainer,
        splits,
        settings,
        teacher_logits=False,  # those of every token would fill the memory
        primary="bleu" if data.source_lang else "rougeL",
        table=lambda output: {
            "source": tokenizer.batch_decode(splits.get("test", splits["validation"])["input_ids"][:], True),
            "prediction": decode(tokenizer, output.predictions),
            "reference": decode(tokenizer, output.label_ids),
        },
        tasks="translation" if data.source_lang else "summarization",
        dataset=data.dataset_name or data.train_file,
    )


if __name__ == "__main__":
    main()
