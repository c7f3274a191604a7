"""Distil an image classifier: by default a ViT-Base fine-tuned on CIFAR-100 into a ViT-Tiny.

    accelerate launch recipes/vit_cifar100.py --output_dir student

Or make a teacher, which is to name a student without a teacher, and distil it into a small ViT from random weights:

    accelerate launch recipes/vit_cifar100.py --student_model_name_or_path google/vit-base-patch16-224-in21k \
        --output_dir teacher
    accelerate launch recipes/vit_cifar100.py --teacher_model_name_or_path teacher --output_dir student \
        --student_model_type vit --student_config_overrides "image_size=32,patch_size=4,hidden_size=192"

Either may be any image classifier, a convolutional network too. The teacher sees the student's random view of an image,
in its own size and normalisation. Views do not change with `--dataloader_num_workers 8`, which keep a GPU busy.
"""

from dataclasses import dataclass, field
from typing import Any

import common
from common import fail, option, parse
from datasets import DatasetDict, Image
from transformers import AutoConfig, AutoModelForImageClassification, set_seed

from hf_dkd import DataCollatorForMixup, DataCollatorWithTeacherInputs, DKDTrainer, DKDTrainingArguments
from hf_dkd.images import AugmentationArguments, AugmentedImages, CountEpochs, ImageCollator, load_processor
from hf_dkd.metrics import classification_metrics

STUDENT, TEACHER = "WinKawaks/vit-tiny-patch16-224", "pkr7098/cifar100-vit-base-patch16-224-in21k"


@dataclass
class ImageDataArguments(common.DataArguments):
    dataset_name: str | None = option("uoft-cs/cifar100", "Hub id, or a folder of images or parquet files.")
    image_column_name: str | None = option(None, "Column of images.")
    label_column_name: str | None = option(None, "Column of labels.")


@dataclass
class ImageArguments(AugmentationArguments, ImageDataArguments):
    image_size: int | None = option(None, "Pixels a side for the student; by default as its checkpoint or config says.")
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each colour, for the student; by default its checkpoint's, or 0.5."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "The same for the standard deviation."})


@dataclass
class ImageTrainingArguments(DKDTrainingArguments):
    output_dir: str = "outputs/vit_cifar100"
    num_train_epochs: float = 10
    learning_rate: float = 2e-4
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 128
    per_device_eval_batch_size: int = 256
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_steps: float = 50
    save_total_limit: int = 1
    remove_unused_columns: bool = False  # the collator makes pixel_values from images


ARGUMENTS = (ImageArguments, common.StudentArguments, ImageTrainingArguments)


def load_images(data: ImageDataArguments) -> tuple[DatasetDict, list[str]]:
    """Splits of columns image (RGB) and labels, and the names of the classes."""
    splits = common.load_splits(data)
    image = common.column(splits, data.image_column_name, ("image", "img"), "image_column_name")
    label = common.column(splits, data.label_column_name, ("label", "labels", "fine_label"), "label_column_name")
    splits, names = common.with_class_labels(splits, label)
    try:
        splits = splits.cast_column(image, Image(mode="RGB"))
        splits["train"][:1]
    except (NotImplementedError, OSError, TypeError, ValueError):
        fail(f"the column {image!r} holds no images; name the one that does with --image_column_name.")
    return splits.select_columns([image, label]).rename_columns({image: "image", label: "labels"}), names


def build(
    data: ImageArguments, student: common.StudentArguments, args: ImageTrainingArguments
) -> tuple[Any, DatasetDict]:
    if not (student.student_model_name_or_path or student.student_model_type or student.student_layers):
        student.student_model_name_or_path = STUDENT
        args.teacher_model_name_or_path = args.teacher_model_name_or_path or TEACHER
    teacher, revision = args.teacher_model_name_or_path, args.teacher_model_revision
    splits, names = load_images(data)
    set_seed(args.seed)  # for the weights that no checkpoint holds
    model = common.load_student(AutoModelForImageClassification, student, teacher, names)
    path = student.student_model_name_or_path or (teacher if student.student_layers else None)
    processor = load_processor(
        None if student.student_config_overrides else path,
        model.config,
        image_size=data.image_size,
        image_mean=data.image_mean,
        image_std=data.image_std,
    )
    collator: Any = ImageCollator(processor)
    with common.loading("teacher", teacher):
        if teacher is not None:
            config = AutoConfig.from_pretrained(teacher, revision=revision)
            teacher_processor = load_processor(teacher, config, revision)
            if teacher_processor.to_dict() != processor.to_dict():
                collator = DataCollatorWithTeacherInputs(collator, ImageCollator(teacher_processor))
        if data.mixup_alpha or data.cutmix_alpha:
            model.config.problem_type = "single_label_classification"  # shares of classes, not several labels
            collator = DataCollatorForMixup(collator, len(names), data.mixup_alpha, data.cutmix_alpha, args.seed)
        trainer = DKDTrainer(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=AugmentedImages(splits["train"], data, args.seed),
            eval_dataset=splits["validation"],
            processing_class=processor,
            compute_metrics=classification_metrics,
            callbacks=[CountEpochs()],
        )
    return trainer, splits


def main() -> None:
    data, student, args, settings = parse(*ARGUMENTS)
    trainer, splits = build(data, student, args)
    common.run(
        trainer,
        splits,
        settings,
        primary="accuracy",
        tasks="image-classification",
        dataset=data.train_file or data.dataset_name,
    )


if __name__ == "__main__":
    main()
