from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from hf_dkd.splits import hold_out


def rows(labels: list[int]) -> Dataset:
    features = Features({"number": Value("int64"), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"number": list(range(len(labels))), "label": labels}, features=features)


def test_each_class_gives_its_share_and_the_seed_decides_which_rows() -> None:
    data = rows([0] * 80 + [1] * 20)
    first, again, other = (hold_out(data, 0.25, seed) for seed in (3, 3, 4))
    assert Counter(first["validation"]["label"]) == {0: 20, 1: 5}
    assert sorted([*first["train"]["number"], *first["validation"]["number"]]) == list(range(100))
    assert first["validation"]["number"][:] == again["validation"]["number"][:]
    assert first["validation"]["number"][:] != other["validation"]["number"][:]


def test_a_class_with_one_example_is_drawn_without_classes() -> None:
    halves = hold_out(rows([0] * 9 + [1]), 0.2)
    assert (len(halves["train"]), len(halves["validation"])) == (8, 2)


def test_running_text_is_cut_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {number}\n" for number in range(10)))
    text = load_dataset("text", data_files=str(tmp_path / "text.txt"), split="train", cache_dir=str(tmp_path))
    halves = hold_out(text, 0.2)
    assert halves["validation"]["text"][:] == ["line 8", "line 9"]
    assert halves["train"]["text"][:2] == ["line 0", "line 1"]


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="test_size"):
        hold_out(rows([0, 1, 0, 1]), 1.5)
