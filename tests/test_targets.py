"""Which rows are distilled, and their targets, where the teacher chooses for those without a label."""

import pytest
import torch

from hf_dkd.heads import Head
from hf_dkd.targets import distilled

NAMES = ("labels",)
IDS = torch.arange(8).view(2, 4)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
TAGS = torch.tensor([[1, -100, 2, -100], [-100, -100, -100, 3]])


def test_examples_with_and_without_a_label_are_all_distilled() -> None:
    labels, chosen = distilled(Head.CLASSIFICATION, {"labels": torch.tensor([1, -100]), "input_ids": IDS}, NAMES)
    assert labels.tolist() == [1, -100]
    assert chosen.all()
    labels, chosen = distilled(Head.CLASSIFICATION, {"pixel_values": torch.zeros(3, 1, 8, 8)}, NAMES)
    assert labels.tolist() == [-100] * 3
    assert chosen.tolist() == [True] * 3


@pytest.mark.parametrize("head", [Head.TOKEN_CLASSIFICATION, Head.LM])
def test_tokens_that_are_visible_or_labelled_are_distilled(head: Head) -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": TAGS}
    labels, chosen = distilled(head, batch, NAMES)
    assert torch.equal(labels, TAGS)
    assert torch.equal(chosen, MASK.bool())
    del batch["labels"]
    labels, chosen = distilled(head, batch, NAMES)
    assert (labels == -100).all()
    assert torch.equal(chosen, MASK.bool())
    assert distilled(head, {"input_ids": IDS}, NAMES)[1].all()
    # Without a mask only the labels tell padding from text.
    assert torch.equal(distilled(head, {"input_ids": IDS, "labels": TAGS}, NAMES)[1], TAGS != -100)


def test_a_causal_model_is_distilled_where_it_predicts() -> None:
    labels, chosen = distilled(
        Head.CAUSAL_LM, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}, NAMES
    )
    assert labels.tolist() == [[1, 2, -100, -100], [5, 6, 7, -100]]
    assert torch.equal(chosen, MASK.bool()), "the last token too, whose next one only the teacher tells"


def test_of_an_encoder_decoder_the_decoders_mask_counts() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": TAGS[:, :3]}
    assert distilled(Head.LM, batch, NAMES, True)[1].tolist() == (TAGS[:, :3] != -100).tolist()
    batch["decoder_input_ids"] = IDS[:, :3]  # as a collator shifts them from the labels, padding and all
    assert distilled(Head.LM, batch, NAMES, True)[1].tolist() == (TAGS[:, :3] != -100).tolist()
    batch["decoder_attention_mask"] = MASK[:, 1:]
    assert torch.equal(distilled(Head.LM, batch, NAMES, True)[1], MASK[:, 1:].bool() | (TAGS[:, :3] != -100))
    with pytest.raises(ValueError, match="decoder_input_ids, which the batch lacks: it has input_ids"):
        distilled(Head.LM, {"input_ids": IDS}, NAMES, True)
