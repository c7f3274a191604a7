"""Which kind of head a model has, and so where its labels stand beside its logits."""

from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto as auto


class Head(StrEnum):
    """Kinds of heads that emit class or token logits, by the shape of their logits and the place of their labels."""

    CLASSIFICATION = "classification"
    """(B, C), labels (B,): images, video, audio, text."""
    MULTI_LABEL = "multi_label"
    """(B, C), labels (B, C) of 0 and 1: several labels an example, each a two-class problem with one logit."""
    TOKEN_CLASSIFICATION = "token_classification"
    """(B, L, C), labels (B, L)."""
    MULTIPLE_CHOICE = "multiple_choice"
    """(B, choices), labels (B,); choices have no names."""
    QUESTION_ANSWERING = "question_answering"
    """Start and end logits, (B, L) each; `start_positions` and `end_positions` (B,)."""
    LM = "lm"
    """(B, L, vocabulary), labels (B, L) aligned with the logits: masked and sequence-to-sequence language models."""
    CAUSAL_LM = "causal_lm"
    """(B, L, vocabulary), where the logits at a position predict the label at the next one."""

    @property
    def has_named_classes(self) -> bool:
        """Whether `config.id2label` names the columns of the logits."""
        return self in (Head.CLASSIFICATION, Head.MULTI_LABEL, Head.TOKEN_CLASSIFICATION)

    @property
    def has_vocabulary(self) -> bool:
        """Whether the columns of the logits are the rows of a vocabulary."""
        return self in (Head.LM, Head.CAUSAL_LM)


# Sequence-to-sequence stands before masked LM, which lists BART's class too. It lists decoder-only models as well: the
# configuration tells which generative models shift.
_FAMILIES: tuple[tuple[str, Mapping[str, Any], Head], ...] = (
    ("AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, Head.CLASSIFICATION),
    ("AutoModelForVideoClassification", auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, Head.CLASSIFICATION),
    ("AutoModelForAudioClassification", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, Head.CLASSIFICATION),
    ("AutoModelForSequenceClassification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, Head.CLASSIFICATION),
    (
        "AutoModelForNextSentencePrediction",
        auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
        Head.CLASSIFICATION,
    ),
    ("AutoModelForTokenClassification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, Head.TOKEN_CLASSIFICATION),
    ("AutoModelForMultipleChoice", auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, Head.MULTIPLE_CHOICE),
    ("AutoModelForQuestionAnswering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, Head.QUESTION_ANSWERING),
    (
        "AutoModelForDocumentQuestionAnswering",
        auto.MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING_NAMES,
        Head.QUESTION_ANSWERING,
    ),
    ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, Head.CAUSAL_LM),
    ("AutoModelForSpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, Head.CAUSAL_LM),
    ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, Head.LM),
    ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, Head.CAUSAL_LM),
    ("AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, Head.CAUSAL_LM),
)

# Decoders that AutoModelForCausalLM loads but whose forward compares logits and labels at the same position.
_UNSHIFTED_DECODERS = frozenset(
    {
        "BartForCausalLM",
        "BigBirdPegasusForCausalLM",
        "BlenderbotForCausalLM",
        "BlenderbotSmallForCausalLM",
        "CpmAntForCausalLM",
        "MBartForCausalLM",
        "MarianForCausalLM",
        "MvpForCausalLM",
        "PLBartForCausalLM",
        "PegasusForCausalLM",
        "ProphetNetForCausalLM",
        "TrOCRForCausalLM",
        "WhisperForCausalLM",
        "XLNetLMHeadModel",
    }
)

# Their logits carry a dimension more than rows of classes: one for each codebook.
_WITHOUT_ROWS = frozenset({"MusicgenForCausalLM", "MusicgenMelodyForCausalLM"})


def bare_model(model: Any) -> nn.Module:
    """The model below the wrappers of peft and `torch.compile`: the one whose class and `forward` tell its kind."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head | None:
    """The kind of head of `model`, from its architecture, and for several labels an example from its
    `config.problem_type`; None where the architecture is not known.

    `model.loss_type` does not tell: it is None for GPT2LMHeadModel, BertLMHeadModel and multiple choice, and names the
    shifting loss for T5 and BART, which do not shift.
    """
    model = bare_model(model)
    family = _family(_class_names(model)) or _registered_family(model)
    if family is None:
        return None
    head = family[1]
    if head is Head.CAUSAL_LM and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Head.LM
    several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return Head.MULTI_LABEL if head is Head.CLASSIFICATION and several else head


def auto_class_name(model: nn.Module) -> str | None:
    """Name of the Auto class in transformers that loads models of the same kind as `model`; None where unknown."""
    model = bare_model(model)
    family = _family(_class_names(model)) or _registered_family(model)
    return family[0] if family else None


def _class_names(model: nn.Module) -> frozenset[str]:
    # Of the parents too: users and FSDP2 subclass the models of transformers.
    return frozenset(parent.__name__ for parent in type(model).__mro__)


@lru_cache
def _family(names: frozenset[str]) -> tuple[str, Head] | None:
    if names & _WITHOUT_ROWS:
        return None
    for auto_name, mapping, head in _FAMILIES:
        listed = {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}
        if names & listed:
            return auto_name, Head.LM if names & _UNSHIFTED_DECODERS else head
    return None


def _registered_family(model: nn.Module) -> tuple[str, Head] | None:
    # What `AutoModelFor….register` was told of, apart from language models: it does not say whether those shift.
    config_class = type(getattr(model, "config", None))
    for auto_name, _, head in _FAMILIES:
        registered = getattr(auto, auto_name)._model_mapping._extra_content.get(config_class)
        if registered is not None and not head.has_vocabulary and isinstance(model, registered):
            return auto_name, head
    return None
