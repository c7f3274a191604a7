"""The benchmark of the paper: a pair of models on CIFAR-100, or on ImageNet, with the published settings.

    accelerate launch recipes/paper_cifar100.py --pair resnet32x4-resnet8x4 --bf16 --torch_compile --teacher_compile

trains the teacher, if `--teacher FOLDER` holds none yet, and distils it. `--distillation kd` is the paper's classical
KD, `--dkd_alpha 0 --dkd_beta 0` trains on the labels alone, without a teacher. `--epochs 60` is the same schedule in a
quarter of its time. With `--minutes 10` it stops after these; the same command goes on from there.

The ImageNet pairs take `--dataset_name FOLDER` with train/CLASS/*.JPEG and val/CLASS/*.JPEG. `paper_ablations.yaml` has
the paper's ablations, for `compare.py`; `paper_table.py` sets what runs reached beside what the paper reports. Pairs
are in `paper_presets.py`, options in `paper_options.py`, images in `paper_data.py`, models in `cifar_models`, trainer
and teacher in `paper_trainer.py` and `paper_teacher.py`; `paper_folders.py` sees to it that a training goes on.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import torch
from accelerate import PartialState
from common import fail, parse
from paper_data import load
from paper_folders import checkpoint_to_resume, finished, kept_for, on_main, refuse_another
from paper_options import PaperArguments, PaperTrainingArguments, is_harmless, refuse_what_is_not_followed
from paper_presets import CIFAR, PAIRS
from paper_teacher import check_classes, load_teacher, make_ready, teacher_path
from paper_trainer import PaperTrainer, make_model, make_trainer, settle_compilation
from transformers import AutoModelForImageClassification, set_seed

from hf_dkd.time_limit import TimeLimit

ARGUMENTS = (PaperArguments, PaperTrainingArguments)


def build(
    data: PaperArguments, args: PaperTrainingArguments, limit: TimeLimit | None = None
) -> tuple[PaperTrainer, dict[str, Any]]:
    """The trainer of the student, whose teacher is trained first if need be, and the splits.

    Raises:
        SystemExit: with one line, where data, teacher or student cannot be loaded or do not fit each other, and where
            the teacher's folder is kept for another one; with code 0 where the time ends before there is a teacher.
    """
    images, teacher, path = load(data, args), None, teacher_path(data, args)
    if args.distils or args.eval_with_teacher:
        make_ready(path, images, data, args, limit)
        teacher = load_teacher(path, images, args)
    set_seed(args.seed)
    start = data.student_model_name_or_path
    with common.loading("student", start):
        auto = AutoModelForImageClassification
        model = make_model(PAIRS[args.pair].student, images.names) if start is None else auto.from_pretrained(start)
        other_names = PAIRS[args.pair].schedule is not CIFAR
        check_classes(f"the student {start}", model.config, images, same_order=True, other_names=other_names)
    args.teacher_model_name_or_path = None  # it is loaded
    trainer = make_trainer(model, images, args, [limit] if limit else [], teacher)
    args.teacher_model_name_or_path = path  # for results.json
    return trainer, images.splits


def accuracies(history: list[dict[str, float]]) -> tuple[float, float, float]:
    """Of the last epoch, of the best one, and which one that was, from the log of a run."""
    epochs = [(entry["eval_accuracy"], entry["epoch"]) for entry in history if "eval_accuracy" in entry]
    if not epochs:
        fail("the run was not evaluated: leave --eval_strategy epoch as it is.")
    best, epoch = max(epochs)
    return epochs[-1][0], best, epoch


def main() -> None:
    data, args, settings = parse(*ARGUMENTS)
    refuse_what_is_not_followed(settings, args.pair)
    output, teacher = Path(args.output_dir), teacher_path(data, args)
    if output.resolve() == Path(teacher).resolve():
        fail(f"{output} is for the student, and the teacher's too: choose another folder with --output_dir.")
    if args.n_gpu > 1:
        fail(
            f"one process sees {args.n_gpu} GPUs, to each of which Trainer would give a whole batch: hide all but one, "
            f"CUDA_VISIBLE_DEVICES=0, or start one process for each, accelerate launch --num_processes {args.n_gpu}."
        )
    if args.torch_compile or args.teacher_compile:
        settle_compilation()
    learned = {name: value for name, value in settings.items() if not is_harmless(name)}
    learned |= {"processes": args.world_size, "mixed_precision": args.mixed_precision}
    limit = TimeLimit(data.minutes) if data.minutes else None

    def is_done() -> bool:
        return finished(args.output_dir) and (output / "results.json").exists()

    if there := on_main(is_done):
        refuse_another(args.output_dir, learned)
    with nullcontext() if there else kept_for(args.output_dir, learned, limit):
        if there or on_main(is_done):
            PartialState().print(f"The training in {output} is done: its results stay as they are.")
        else:
            args.resume_from_checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
            trainer, splits = build(data, args, limit)
            dataset = data.train_file or data.dataset_name
            common.run(trainer, splits, settings, primary="accuracy", tasks="image-classification", dataset=dataset)
    if args.process_index == 0:
        last, best, epoch = accuracies(json.loads((output / "trainer_state.json").read_text())["log_history"])
        print(f"Accuracy: last epoch {100 * last:.2f} %, best epoch {100 * best:.2f} % (epoch {epoch:g}).")
    if torch.distributed.is_initialized():  # no trainer has ended the processes together
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
