"""Collators: the teacher's inputs beside the student's in one batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .teacher import TEACHER_PREFIX

_LABELS = frozenset({"label", "labels", "label_ids"})


@dataclass
class DataCollatorWithTeacherInputs:
    """Both models' inputs in one batch, the teacher's under `teacher_` names.

    For a teacher with another image size, another normalisation or another tokenizer. Where the examples hold columns
    with the `teacher_` prefix, the teacher's collator gets those, without the prefix, and the student's collator the
    others. Where they hold none, both get the whole examples (an image, say, which each processes in its own way).

    Args:
        collator: makes the student's batch, labels included.
        teacher_collator: makes the teacher's; labels in what it returns are dropped.

    Example:
        >>> student, teacher = DataCollatorWithPadding(tokenizer), DataCollatorWithPadding(teacher_tokenizer)
        >>> data_collator = DataCollatorWithTeacherInputs(student, teacher)
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    teacher_collator: Callable[[list[Any]], Mapping[str, Any]]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate a list of examples into one dictionary of both models' inputs.

        Raises:
            ValueError: where only some of the examples have columns for the teacher.
        """
        own = [_without_prefix(example) for example in examples]
        separate = all(own)
        if any(own) and not separate:
            lacking = own.index({})
            raise ValueError(
                f"Example {lacking} of the batch has no column that starts with {TEACHER_PREFIX!r}, but others have: "
                f"its columns are {', '.join(examples[lacking])}. Bring the teacher's columns in all examples or none."
            )
        students = [_without_teacher(example) for example in examples]
        batch = dict(self.collator(students))
        for name, value in self.teacher_collator(own if separate else [dict(example) for example in examples]).items():
            if name not in _LABELS:
                batch[TEACHER_PREFIX + name] = value
        return batch


def _without_prefix(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(TEACHER_PREFIX): v for name, v in example.items() if name.startswith(TEACHER_PREFIX)}


def _without_teacher(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in example.items() if not name.startswith(TEACHER_PREFIX)}
