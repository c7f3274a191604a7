"""Distil a causal language model on running text, or on prompts and completions; train all of it, or a LoRA adapter.

    accelerate launch recipes/causal_lm.py --student_model_name_or_path HuggingFaceTB/SmolLM2-360M --output_dir teacher
    accelerate launch recipes/causal_lm.py --student_model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --teacher_model_name_or_path teacher --output_dir student

Without a teacher it fine-tunes, which is how to make one; teacher and student share a tokenizer. With no option at all
it distils SmolLM2-360M into SmolLM2-135M on WikiText-2. `--lora_r 16` trains an adapter, which its own base may teach
with no second copy of the weights: `--teacher_adapter base` (adapters off) or `--teacher_adapter FOLDER` (another).
"""

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from common import (
    DataArguments,
    StudentArguments,
    column,
    is_cached,
    load_splits,
    load_student,
    load_tokenizer,
    loading,
    run,
)
from datasets import DatasetDict
from options import fail, option, parse
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, set_seed

from hf_dkd import DKDTrainer, DKDTrainingArguments, Teacher
from hf_dkd.metrics import TOKEN_SCORES, language_metrics, token_scores


@dataclass
class LanguageDataArguments(DataArguments):
    text_column_name: str | None = option(None, "Column of texts.")
    prompt_column_name: str | None = option(None, "Column of prompts, which carry no loss, for a completion each.")
    completion_column_name: str | None = option(None, "Column of completions.")
    block_size: int = option(512, "Tokens in an example.")
    packing: bool = option(True, "Join texts and cut them into blocks; False pads each, as prompts always are.")
    append_eos: bool = option(False, "End texts with EOS, as where each is a document; completions always do.")


@dataclass
class LanguageStudentArguments(StudentArguments):
    lora_r: int = option(0, "Rank of a LoRA adapter, to train it instead of the student; 0 trains the whole student.")
    lora_alpha: int = option(32, "The adapter is scaled by alpha / rank.")
    lora_dropout: float = option(0.05, "Dropout before the adapter.")
    lora_target_modules: str = option("all-linear", "Modules that get the adapter: 'q_proj,v_proj'.")


@dataclass
class LanguageTrainingArguments(DKDTrainingArguments):
    output_dir: str = "outputs/causal_lm"
    teacher_adapter: str | None = option(
        None, "The teacher within a LoRA student: 'base', its adapter switched off, or the path of another adapter."
    )
    num_train_epochs: float = 1
    learning_rate: float = 5e-5
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    warmup_steps: float = 0.05
    eval_strategy: str = "epoch"
    logging_steps: float = 50
    save_total_limit: int = 1


ARGUMENTS = (LanguageDataArguments, LanguageStudentArguments, LanguageTrainingArguments)


def load_texts(data: LanguageDataArguments) -> DatasetDict:
    """Splits of a column text, or of the columns prompt and completion."""
    if data.dataset_name is None and data.train_file is None:
        data.dataset_name, data.dataset_config_name = "Salesforce/wikitext", "wikitext-2-raw-v1"
    splits = load_splits(data)
    if is_cached(splits):
        return splits
    pairs = data.text_column_name is None and {"prompt", "completion"} <= set(splits["train"].column_names)
    kinds = ("prompt", "completion") if pairs or data.prompt_column_name or data.completion_column_name else ("text",)
    asked = {kind: f"{kind}_column_name" for kind in kinds}
    columns = {column(splits, getattr(data, name), (kind,), name): kind for kind, name in asked.items()}
    return splits.select_columns(list(columns)).rename_columns(columns)


def encode(rows: dict[str, list], tokenizer: Any, data: LanguageDataArguments, ending: str) -> dict[str, list]:
    """Token ids and labels, which are -100 in a prompt."""

    def tokens(texts: list[str | None], end: str) -> list[list[int]]:
        return tokenizer([(text or "") + end for text in texts], add_special_tokens=False).input_ids

    size = data.block_size
    texts = tokens(rows["text" if "text" in rows else "completion"], ending)
    if data.packing and "text" in rows:
        stream = list(chain.from_iterable(texts))
        # Nothing is predicted in a block of one token.
        blocks = [stream[first : first + size] for first in range(0, len(stream) - 1, size)]
        return {"input_ids": blocks, "labels": blocks}
    starts = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []
    prompts = [starts + prompt for prompt in tokens(rows.get("prompt", [""] * len(texts)), "")]
    # Where both are too long for a block, the completion and the end of the prompt stay.
    ends = [text[:size] for text in texts]
    prompts = [prompt[max(len(prompt) + len(end) - size, 0) :] for prompt, end in zip(prompts, ends, strict=True)]
    examples = [(start, end) for start, end in zip(prompts, ends, strict=True) if len(start) + len(end) > 1]
    return {
        "input_ids": [start + end for start, end in examples],
        "labels": [[-100] * len(start) + end for start, end in examples],
    }


def with_adapter(model: Any, student: LanguageStudentArguments, teacher: str | None) -> Any:
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
        model = get_peft_model(model, config)
        if teacher not in (None, "base"):
            model.load_adapter(teacher, "teacher", is_trainable=False, torch_device="cpu")
            model.set_adapter("default")  # which loading froze, in peft 0.19
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"--lora_target_modules {targets} --teacher_adapter {teacher}: {' '.join(str(error).split())}")
    # The teacher's adapter is not saved with the student's.
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
    return model


def build(
    data: LanguageDataArguments, student: LanguageStudentArguments, args: LanguageTrainingArguments
) -> tuple[Any, DatasetDict]:
    set_seed(args.seed)
    within = args.teacher_adapter
    if within and (not student.lora_r or args.teacher_model_name_or_path):
        fail("--teacher_adapter is a teacher within a LoRA student: give --lora_r, no --teacher_model_name_or_path.")
    splits = load_texts(data)
    if not (student.student_model_name_or_path or student.student_model_type or args.teacher_model_name_or_path):
        student.student_model_name_or_path = "HuggingFaceTB/SmolLM2-135M"
        args.teacher_model_name_or_path = None if within or is_cached(splits) else "HuggingFaceTB/SmolLM2-360M"
    teacher = args.teacher_model_name_or_path
    tokenizer = load_tokenizer(student.student_model_name_or_path or teacher, "student")
    if teacher and load_tokenizer(teacher, "teacher").get_vocab() != tokenizer.get_vocab():
        fail(f"the teacher {teacher!r} has another tokenizer than the student: take two models of one family.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # Lines of a text file come without their line break.
    ending = "\n" if splits["train"].info.builder_name == "text" else ""
    ending += tokenizer.eos_token if data.append_eos or "completion" in splits["train"].column_names else ""
    tokenize = partial(encode, tokenizer=tokenizer, data=data, ending=ending)
    if not is_cached(splits):
        with args.main_process_first(desc="tokenizing"):
            splits = splits.map(tokenize, batched=True, remove_columns=splits["train"].column_names, desc="Tokenizing")

    model: Any = load_student(AutoModelForCausalLM, student, teacher)
    # Small updates would be lost in weights of half precision; --bf16 computes in it.
    model = with_adapter(model, student, within) if student.lora_r else model.float()
    with loading("teacher", teacher):
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
    run(
        trainer,
        splits,
        settings,
        teacher_logits=False,  # those of every token would fill the memory
        primary="perplexity",
        higher_is_better=False,
        table=lambda output: dict(zip(TOKEN_SCORES, np.transpose(output.predictions), strict=True)),
        tasks="text-generation",
        dataset=data.dataset_name or data.train_file,
    )


if __name__ == "__main__":
    main()
