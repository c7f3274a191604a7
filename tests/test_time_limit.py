"""Training in slices."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_dkd.time_limit import TimeLimit, last_checkpoint


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "missing") is None
    for step in (9, 20, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if step < 100:
            (folder / "trainer_state.json").write_text('{"global_step": 9}')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    for text in ("", '{"global_step": 1'):  # a state of which a part was written
        (tmp_path / "checkpoint-100/trainer_state.json").write_text(text)
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-100/trainer_state.json").write_text('{"global_step": 100}')
    (tmp_path / "checkpoint-100-copy").mkdir()
    (tmp_path / "checkpoint-100-copy/trainer_state.json").write_text('{"global_step": 100}')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_limit_is_above_zero(minutes: float) -> None:
    with pytest.raises(ValueError, match=r"the time limit is .* minutes; expected a number above 0"):
        TimeLimit(minutes)


def test_a_limit_counts_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    limit, args = TimeLimit(2), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for seconds, over in ((0, False), (119.9, False), (120, True)):
        now, control = 1000.0 + seconds, TrainerControl()
        limit.on_step_end(args, TrainerState(epoch=0.5, global_step=5, max_steps=10), control)
        assert (control.should_save, limit.over) == (over, over)
