"""Run a teacher once over the data of a recipe, and train on what it said, as often as one likes, without it.

    accelerate launch recipes/cache_teacher.py --recipe_name bert_classification --dataset_name dair-ai/emotion \
        --teacher_model_name_or_path teacher --student_model_name_or_path distilbert/distilbert-base-uncased \
        --output_dir cache
    accelerate launch recipes/bert_classification.py --dataset_name cache \
        --student_model_name_or_path distilbert/distilbert-base-uncased --output_dir student

Give it the options that the recipe itself would get: the data, the student (whose tokenizer splits the texts) and the
teacher. A language model's logits are cut to the largest ones with `--top_k 64`, for the `--dkd_temperature` of the
training to come. A run that is killed goes on where it was; on several processes each takes a part of the data.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import fail, option, parse
from datasets import ClassLabel, Dataset
from transformers import HfArgumentParser

from hf_dkd import cache_teacher_outputs

RECIPES = ("bert_classification", "causal_lm")


@dataclass
class CacheArguments:
    """What is kept of the teacher."""

    recipe_name: str = option(RECIPES[0], "The recipe whose data and models are meant.", choices=RECIPES)
    top_k: int | None = option(None, "Logits of each token that are kept; without it all are.")
    cache_dtype: str = option("float16", "Type of the logits.", choices=["float16", "float32"])
    cache_batch_size: int = option(32, "Examples that the teacher reads at a time, in each process.")
    num_views: int | None = option(None, "Views of data that is augmented at random.")


def with_names(split: Dataset, model: Any) -> Dataset:
    """`split` with the names of its classes, which are the student's, so that the training finds them."""
    if "labels" not in split.column_names or not hasattr(split.features["labels"], "dtype"):
        return split
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    return split.cast_column("labels", ClassLabel(names=names))


def main() -> None:
    words: Any = HfArgumentParser((CacheArguments,), add_help=False)  # type: ignore[arg-type]
    recipe = importlib.import_module(words.parse_known_args()[0].recipe_name)
    given: Any = parse(CacheArguments, *recipe.ARGUMENTS)
    cache, data, student, args, _ = given
    if args.teacher_model_name_or_path is None and getattr(args, "teacher_adapter", None) is None:
        fail("no teacher: give --teacher_model_name_or_path (a Hub id or a folder).")
    # The folder is for the outputs: nothing is trained.
    trainer, splits = recipe.build(data, student, args)
    folder = Path(args.output_dir)
    for name, split in splits.items():
        try:
            outputs = cache_teacher_outputs(
                trainer.teacher,
                with_names(split, trainer.model),
                folder / name,
                data_collator=trainer.data_collator,
                batch_size=cache.cache_batch_size,
                top_k=cache.top_k,
                temperature=args.dkd_temperature,
                dtype=cache.cache_dtype,
                num_views=cache.num_views,
                num_workers=args.dataloader_num_workers,
            )
        except ValueError as error:
            fail(" ".join(str(error).split()))
        if trainer.is_world_process_zero():
            size = sum(file.stat().st_size for file in (folder / name).glob("*.arrow"))
            print(f"{name}: {len(outputs)} examples, {size / max(len(outputs), 1):.0f} bytes each.")
    if trainer.is_world_process_zero():
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}), encoding="utf-8")
        print(f"Wrote the teacher's outputs to {folder}: train with --dataset_name {folder}.", flush=True)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
