"""Training on cached outputs: as with the live teacher, and refused where the two would differ."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_dkd import CachedTeacher, DKDTrainer, cache_teacher_outputs
from hf_dkd.cache_format import manifest_of

from .cache_helpers import cached, padding_collator, ragged, rows_of, teacher_of, weights_after
from .models import ARCHITECTURES
from .trainer_helpers import arguments, logs_of, weights_of

# --- As the live teacher ---


@pytest.mark.parametrize(
    ("name", "steps"), [("bert", 50), ("bert_tokens", 50), ("llama", 50), ("vit", 6), ("t5", 6), ("bert_mlm", 6)]
)
def test_the_weights_are_those_of_a_run_with_the_live_teacher(name: str, steps: int, tmp_path: Path) -> None:
    """Shuffled, over up to 25 epochs."""
    data = rows_of(name)
    live = weights_after(tmp_path, name, data, teacher_of(name), max_steps=steps)
    stored = weights_after(tmp_path, name, cached(tmp_path / "cache", name, data), max_steps=steps)
    assert (stored - live).abs().max() <= 1e-6


def test_the_weights_without_a_teacher_are_others(tmp_path: Path) -> None:
    live = weights_after(tmp_path, "bert", rows_of("bert"), teacher_of("bert"), max_steps=6)
    plain = weights_after(tmp_path, "bert", rows_of("bert"), max_steps=6)
    assert (plain - live).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_lengths_are_padded_as_the_collator_pads(side: str, tmp_path: Path) -> None:
    data, collator = ragged("llama", seeds=2), padding_collator(tmp_path, side, multiple=4)
    live = weights_after(tmp_path, "llama", data, teacher_of("llama"), collator, max_steps=8)
    result = cached(tmp_path / "cache", "llama", data, data_collator=collator, batch_size=5)
    stored = weights_after(tmp_path, "llama", result, None, collator, max_steps=8)
    assert (stored - live).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_streams_are_as_the_live_teacher(name: str, tmp_path: Path) -> None:
    data = rows_of(name, seeds=2)

    def stream(rows: Dataset) -> Any:
        return rows.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=4)

    live = weights_after(tmp_path, name, stream(data), teacher_of(name), max_steps=9)
    stored = weights_after(tmp_path, name, stream(cached(tmp_path / "cache", name, data)), max_steps=9)
    assert (stored - live).abs().max() <= 1e-6


def test_every_logit_as_the_top_k_is_the_live_teacher(tmp_path: Path) -> None:
    settings = {"max_steps": 20, "dkd_temperature": 2.0}
    live = weights_after(tmp_path, "llama", rows_of("llama"), teacher_of("llama"), **settings)
    data = cached(tmp_path / "cache", "llama", top_k=64, temperature=2.0)
    assert (weights_after(tmp_path, "llama", data, **settings) - live).abs().max() <= 1e-6


def test_float16_and_few_logits_stay_near(tmp_path: Path) -> None:
    """How far the weights end up from the live teacher's, as a share of the way that they went: what README states."""
    start = weights_of(ARCHITECTURES["llama"].model(seed=0))
    live = weights_after(tmp_path, "llama", rows_of("llama"), teacher_of("llama"))

    def share(**settings: Any) -> float:
        data = cached(tmp_path / str(settings), "llama", **settings)
        return float((weights_after(tmp_path, "llama", data) - live).norm() / (live - start).norm())

    half, of_k = share(dtype="float16"), [share(dtype="float16", top_k=k) for k in (4, 16, 64)]
    assert half < 2e-3
    assert of_k[0] > of_k[1] > of_k[2]
    assert of_k[2] < 2e-3


def test_what_is_logged_and_evaluated_is_as_with_the_live_teacher(tmp_path: Path) -> None:
    results = []
    for data, teacher in (
        (rows_of("llama"), ARCHITECTURES["llama"].model(seed=1)),
        (cached(tmp_path / "whole", "llama"), None),
        (cached(tmp_path / "top", "llama", top_k=64), None),
    ):
        args = arguments(tmp_path, max_steps=3, eval_with_teacher=True, dkd_warmup_steps=2)
        trainer = DKDTrainer(
            ARCHITECTURES["llama"].model(seed=0), args, train_dataset=data, eval_dataset=data, teacher=teacher
        )
        trainer.train()
        metrics = {key: value for key, value in trainer.evaluate().items() if "_per_second" not in key}
        del metrics["eval_runtime"]
        results.append([*({k: v for k, v in log.items() if k != "grad_norm"} for log in logs_of(trainer)), metrics])
    assert {"eval_tckd", "eval_nckd", "eval_teacher_agreement", "eval_teacher_accuracy"} <= results[0][-1].keys()
    for stored in results[1:]:
        for got, expected in zip(stored, results[0], strict=True):
            assert got == pytest.approx(expected, rel=1e-4)


def test_few_logits_log_the_agreement_of_whole_rows(tmp_path: Path) -> None:
    """The tail as one class may outweigh every other: it must not count as the argmax."""
    logs = []
    for settings in ({}, {"top_k": 1}):
        data = cached(tmp_path / str(settings), "llama", rows_of("llama", seeds=4), **settings)
        args = arguments(tmp_path, per_device_train_batch_size=32, eval_with_teacher=True)
        trainer = DKDTrainer(ARCHITECTURES["llama"].model(seed=1), args, train_dataset=data, eval_dataset=data)
        trainer.train()
        logs.append((logs_of(trainer)[0]["teacher_agreement"], trainer.evaluate()["eval_teacher_accuracy"]))
    assert logs[0][0] == pytest.approx(1), "the student is the teacher at first"
    assert logs[1] == pytest.approx(logs[0])


def named(name: str, seed: int, names: str) -> Any:
    return ARCHITECTURES[name].model(seed=seed, id2label=dict(enumerate(names)))


def test_classes_are_reordered_by_name(tmp_path: Path) -> None:
    data = rows_of("bert")
    stored = cache_teacher_outputs(named("bert", 1, "edcba"), data, tmp_path / "cache", dtype="float32")
    live = weights_after(
        tmp_path, "bert", data, named("bert", 1, "edcba"), student=named("bert", 0, "abcde"), max_steps=4
    )
    of_cache = weights_after(tmp_path, "bert", stored, student=named("bert", 0, "abcde"), max_steps=4)
    assert (of_cache - live).abs().max() <= 1e-6


def test_the_top_k_is_kept_in_the_order_of_the_labels(tmp_path: Path) -> None:
    name, data = "bert_tokens", rows_of("bert_tokens")
    settings: dict[str, Any] = {"dtype": "float32", "top_k": 5}
    right = cache_teacher_outputs(
        named(name, 1, "edcba"), data, tmp_path / "right", label_names=list("abcde"), **settings
    )
    live = weights_after(tmp_path, name, data, named(name, 1, "edcba"), student=named(name, 0, "abcde"), max_steps=4)
    of_cache = weights_after(tmp_path, name, right, student=named(name, 0, "abcde"), max_steps=4)
    assert (of_cache - live).abs().max() <= 1e-6
    wrong = cache_teacher_outputs(named(name, 1, "edcba"), data, tmp_path / "wrong", **settings)
    with pytest.raises(ValueError, match=r"cache with label_names="):
        weights_after(tmp_path, name, wrong, student=named(name, 0, "abcde"), max_steps=1)


def test_padding_rows_of_the_vocabulary_are_cut(tmp_path: Path) -> None:
    def larger() -> Any:
        return ARCHITECTURES["llama"].model(seed=1, vocab_size=68)

    data, settings = rows_of("llama"), {"dtype": "float32"}
    top = cache_teacher_outputs(larger(), data, tmp_path / "top", top_k=64, num_classes=64, **settings)
    dense = cache_teacher_outputs(larger(), data, tmp_path / "dense", **settings)
    live = weights_after(tmp_path, "llama", data, larger(), max_steps=4)
    for rows in (dense, top):
        assert (weights_after(tmp_path, "llama", rows, max_steps=4) - live).abs().max() <= 1e-6
    uncut = cache_teacher_outputs(larger(), data, tmp_path / "uncut", top_k=8, **settings)
    with pytest.raises(ValueError, match="cache with num_classes=64"):
        weights_after(tmp_path, "llama", uncut, max_steps=1)


def test_a_student_with_more_padding_rows_takes_the_top_k(tmp_path: Path) -> None:
    def student() -> Any:
        return ARCHITECTURES["llama"].model(seed=0, vocab_size=68)

    live = weights_after(tmp_path, "llama", rows_of("llama"), teacher_of("llama"), student=student(), max_steps=4)
    data = cached(tmp_path / "c", "llama", top_k=64)
    assert (weights_after(tmp_path, "llama", data, student=student(), max_steps=4) - live).abs().max() <= 1e-6


# --- Evaluation ---


def test_data_without_outputs_is_evaluated_without_the_teacher_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, eval_with_teacher=True)
    data = cached(tmp_path / "c", "bert")
    trainer = DKDTrainer(ARCHITECTURES["bert"].model(), args, train_dataset=data, eval_dataset=rows_of("bert"))
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics
    assert "eval_tckd" not in metrics
    assert sum("the terms with the teacher are left out" in record.message for record in caplog.records) == 1
    assert "eval_tckd" in trainer.evaluate(data)


def test_the_live_teacher_runs_where_nothing_is_cached(tmp_path: Path) -> None:
    teacher = ARCHITECTURES["bert"].model(seed=1)
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    args = arguments(tmp_path, eval_with_teacher=True, max_steps=4)
    data = cached(tmp_path / "c", "bert")
    trainer = DKDTrainer(
        ARCHITECTURES["bert"].model(), args, train_dataset=data, eval_dataset=rows_of("bert"), teacher=teacher
    )
    trainer.train()
    assert not calls
    live, stored = trainer.evaluate(), trainer.evaluate(data)
    assert len(calls) == 2
    assert live["eval_tckd"] == pytest.approx(stored["eval_tckd"], rel=1e-5)
    with pytest.raises(ValueError, match="of other weights or another config"):
        DKDTrainer(ARCHITECTURES["bert"].model(), args, train_dataset=data, teacher=ARCHITECTURES["bert"].model(seed=2))


def test_metrics_get_the_cached_logits(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []
    args = arguments(tmp_path, include_for_metrics=["teacher_logits"])
    data = cached(tmp_path / "c", "bert")
    DKDTrainer(
        ARCHITECTURES["bert"].model(), args, train_dataset=data, eval_dataset=data,
        compute_metrics=lambda prediction: (seen.append(prediction.teacher_logits), {})[1],
    ).evaluate()  # fmt: skip
    np.testing.assert_allclose(seen[0], np.stack(data["teacher_logits"]), atol=1e-7)


# --- Refused ---


def change(column: str, function: Any) -> Any:
    return lambda data: data.map(lambda row: {column: function(row[column])})


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("bert", change("labels", lambda label: (label + 1) % 5), "column 'labels' is not the one"),
        ("bert", change("input_ids", lambda ids: [3, *ids[1:]]), "column 'input_ids' is not the one"),
        ("llama", change("labels", lambda labels: [-100, -100, -100, *labels[3:]]), "column 'labels'"),
        ("vit", change("pixel_values", lambda image: (np.array(image) * 1.01).tolist()), "column 'pixel_values'"),
        ("bert", lambda data: data.remove_columns("teacher_check"), "lack teacher_check"),
        ("bert", lambda data: data.map(lambda rows: dict(rows.items()), batched=True), "pass teacher=CachedTeacher"),
    ],
)
def test_other_data_than_the_teacher_saw_is_refused(name: str, spoil: Any, message: str, tmp_path: Path) -> None:
    data = spoil(cached(tmp_path / "c", name))
    with pytest.raises(ValueError, match=message):
        DKDTrainer(ARCHITECTURES[name].model(), arguments(tmp_path, max_steps=2), train_dataset=data).train()


def test_outputs_without_a_manifest_go_with_the_cached_teacher(tmp_path: Path) -> None:
    data = cached(tmp_path / "c", "bert")
    lost = data.map(lambda rows: dict(rows.items()), batched=True)
    assert manifest_of(lost) is None
    expected = weights_after(tmp_path, "bert", data, max_steps=2, train_sampling_strategy="sequential")
    for rows in (lost, lost.to_iterable_dataset()):
        got = weights_after(
            tmp_path, "bert", rows, CachedTeacher(data), max_steps=2, train_sampling_strategy="sequential"
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dkd_temperature": 2.0}, "dkd_temperature is 2, but .* holds for 1 alone"),
        ({"dkd_standardize": True}, "dkd_standardize needs all logits"),
        ({"dkd_top_k": 3}, "dkd_top_k needs all logits"),
        ({"dkd_target": "teacher"}, "cached for the tokens with a label alone"),
    ],
)
def test_settings_that_the_top_k_does_not_serve_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = cached(tmp_path / "c", "llama", top_k=4)
    with pytest.raises(ValueError, match=message):
        DKDTrainer(ARCHITECTURES["llama"].model(), arguments(tmp_path, **settings), train_dataset=data)
    trainer = DKDTrainer(ARCHITECTURES["llama"].model(), arguments(tmp_path), train_dataset=data)
    for name, value in settings.items():  # as a search does
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_other_heads_classes_and_collators_are_refused(tmp_path: Path) -> None:
    data = cached(tmp_path / "c", "bert_tokens")
    with pytest.raises(ValueError, match="those of a token_classification head, and the student has a classification"):
        DKDTrainer(ARCHITECTURES["bert"].model(), arguments(tmp_path), train_dataset=data)
    other = ARCHITECTURES["bert_tokens"].model(num_labels=4)
    with pytest.raises(ValueError, match="The student has 4 classes and the teacher 5"):
        DKDTrainer(other, arguments(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match="different teacher outputs: dtype 'float32', now 'float16'"):
        DKDTrainer(
            ARCHITECTURES["bert_tokens"].model(), arguments(tmp_path), train_dataset=data,
            eval_dataset=cached(tmp_path / "half", "bert_tokens", dtype="float16"),
        )  # fmt: skip


def test_a_data_set_without_outputs_has_no_cached_teacher() -> None:
    with pytest.raises(ValueError, match="holds no outputs of a teacher"):
        CachedTeacher(rows_of("bert"))


def test_a_part_of_a_cache_is_a_cache_and_a_mapped_stream_is_refused(tmp_path: Path) -> None:
    data = cached(tmp_path / "cache", "bert")
    part = torch.utils.data.Subset(data, list(range(4)))
    trainer = DKDTrainer(ARCHITECTURES["bert"].model(seed=0), arguments(tmp_path), train_dataset=part)
    assert isinstance(trainer.teacher, CachedTeacher)
    trainer.train()
    assert logs_of(trainer)[0]["dkd"] > 0
    stream = data.to_iterable_dataset().map(lambda row: row)
    with pytest.raises(ValueError, match="took away what tells where they come from"):
        DKDTrainer(ARCHITECTURES["bert"].model(seed=0), arguments(tmp_path), train_dataset=stream)


def test_a_cache_joined_with_other_data_is_refused(tmp_path: Path) -> None:
    joined = concatenate_datasets([cached(tmp_path / "cache", "bert"), rows_of("bert")])
    trainer = DKDTrainer(
        ARCHITECTURES["bert"].model(seed=0), arguments(tmp_path, per_device_train_batch_size=16), train_dataset=joined
    )
    with pytest.raises(ValueError, match=r"The examples lack teacher_.*cache every data set that is joined"):
        trainer.train()
