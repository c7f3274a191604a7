"""Distil a causal language model on running text, or on prompts and completions; train all of it, or a LoRA adapter.

    accelerate launch recipes/causal_lm.py --student_model_name_or_path HuggingFaceTB/SmolLM2-360M --output_dir teacher
    accelerate launch recipes/causal_lm.py --student_model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --teacher_model_name_or_path teacher --output_dir student

Without a teacher it fine-tunes, which is how to make one; teacher and student share a tokenizer. With no option at all
it distils SmolLM2-360M into SmolLM2-135M on WikiText-2. `--lora_r 16` trains an adapter, which its own base may teach
with no second copy of the weights: `--teacher_adapter base` (adapters off) or `--teacher_adapter FOLDER` (another).
"""

from dataclasses import dataclass
from typing import Any

import common
from common import fail, option, parse
from datasets import DatasetDict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, set_seed

from hf_dkd import DKDTrainer, DKDTrainingArguments, Teacher
from hf_dkd.metrics import language_metrics, score_columns, token_scores
from hf_dkd.student import add_adapter
from hf_dkd.text import mask_prompts, pack_texts, tokenized


@dataclass
class CorpusArguments(common.DataArguments):
    text_column_name: str | None = option(None, "Column of texts.")
    prompt_column_name: str | None = option(None, "Column of prompts, which carry no loss, for a completion each.")
    completion_column_name: str | None = option(None, "Column of completions.")
    block_size: int = option(512, "Tokens in an example.")
    packing: bool = option(True, "Join texts and cut them into blocks; False pads each, as prompts always are.")
    append_eos: bool = option(False, "End texts with EOS, as where each is a document; completions always do.")


@dataclass
class AdapterArguments(common.StudentArguments):
    lora_r: int = option(0, "Rank of a LoRA adapter, to train it instead of the student; 0 trains the whole student.")
    lora_alpha: int = option(32, "The adapter is scaled by alpha / rank.")
    lora_dropout: float = option(0.05, "Dropout before the adapter.")
    lora_target_modules: str = option("all-linear", "Modules that get the adapter: 'q_proj,v_proj'.")


@dataclass
class LanguageTrainingArguments(DKDTrainingArguments):
    output_dir: str = "outputs/causal_lm"
    teacher_adapter: str | None = option(None, "Teacher within a LoRA student: 'base' (adapter off) or another's path.")
    num_train_epochs: float = 1
    learning_rate: float = 5e-5
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    warmup_steps: float = 0.05
    eval_strategy: str = "epoch"
    logging_steps: float = 50
    save_total_limit: int = 1


ARGUMENTS = (CorpusArguments, AdapterArguments, LanguageTrainingArguments)


def load_texts(data: CorpusArguments) -> DatasetDict:
    """Splits of a column text, or of the columns prompt and completion."""
    if data.dataset_name is None and data.train_file is None:
        data.dataset_name, data.dataset_config_name = "Salesforce/wikitext", "wikitext-2-raw-v1"
    splits = common.load_splits(data)
    pairs = data.text_column_name is None and {"prompt", "completion"} <= set(splits["train"].column_names)
    kinds = ("prompt", "completion") if pairs or data.prompt_column_name or data.completion_column_name else ("text",)
    return common.select_columns(splits, data, {kind: (kind,) for kind in kinds})


def encode(rows: dict[str, list], tokenizer: Any, data: CorpusArguments, ending: str) -> dict[str, list]:
    """Token ids and labels, which are -100 in a prompt."""
    texts = rows["text" if "text" in rows else "completion"]
    if data.packing and "text" in rows:
        return pack_texts(tokenizer, texts, data.block_size, ending)
    return mask_prompts(tokenizer, rows.get("prompt"), texts, data.block_size, ending)


def with_adapter(model: Any, student: AdapterArguments, teacher: str | None) -> Any:
    """`model` with frozen weights and an adapter, which is all that is trained and saved, and maybe the teacher's."""
    if student.student_layers or student.student_config_overrides or student.student_model_type:
        fail("--lora_r saves an adapter without its base, which must be a checkpoint: fine-tune a changed one first.")
    targets = student.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=student.lora_r,
        lora_alpha=student.lora_alpha,
        lora_dropout=student.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
    )
    try:
        return add_adapter(model, config, teacher=None if teacher == "base" else teacher)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"--lora_target_modules {targets} --teacher_adapter {teacher}: {' '.join(str(error).split())}")


def build(data: CorpusArguments, student: AdapterArguments, args: LanguageTrainingArguments) -> tuple[Any, DatasetDict]:
    set_seed(args.seed)
    within = args.teacher_adapter
    if within and (not student.lora_r or args.teacher_model_name_or_path):
        fail("--teacher_adapter is a teacher within a LoRA student: give --lora_r, no --teacher_model_name_or_path.")
    if not (student.student_model_name_or_path or student.student_model_type or args.teacher_model_name_or_path):
        student.student_model_name_or_path = "HuggingFaceTB/SmolLM2-135M"
        args.teacher_model_name_or_path = None if within else "HuggingFaceTB/SmolLM2-360M"
    teacher = args.teacher_model_name_or_path
    splits = load_texts(data)
    tokenizer = common.load_shared_tokenizer(student.student_model_name_or_path, teacher)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # Lines of a text file come without their line break.
    ending = "\n" if splits["train"].info.builder_name == "text" else ""
    ending += tokenizer.eos_token if data.append_eos or "completion" in splits["train"].column_names else ""
    splits = tokenized(splits, args, encode, tokenizer=tokenizer, data=data, ending=ending)

    model: Any = common.load_student(AutoModelForCausalLM, student, teacher)
    # Small updates would be lost in weights of half precision; --bf16 computes in it.
    model = with_adapter(model, student, within) if student.lora_r else model.float()
    with common.loading("teacher", teacher):
        trainer = DKDTrainer(
            model=model,
            args=args,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            compute_metrics=language_metrics,
            preprocess_logits_for_metrics=token_scores,
            teacher=Teacher.from_adapter(model, None if within == "base" else "teacher") if within else None,
        )
    return trainer, splits


def main() -> None:
    data, student, args, settings = parse(*ARGUMENTS)
    trainer, splits = build(data, student, args)
    common.run(
        trainer,
        splits,
        settings,
        teacher_logits=False,  # those of every token would fill the memory
        primary="perplexity",
        higher_is_better=False,
        table=score_columns,
        tasks="text-generation",
        dataset=data.dataset_name or data.train_file,
    )


if __name__ == "__main__":
    main()
