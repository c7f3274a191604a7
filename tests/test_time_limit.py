"""Training in slices."""

from pathlib import Path

import pytest

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
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_limit_is_above_zero(minutes: float) -> None:
    with pytest.raises(ValueError, match=r"the time limit is .* minutes; expected a number above 0"):
        TimeLimit(minutes)
