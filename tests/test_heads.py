import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_dkd.heads import Head, auto_class_name, bare_model, head_of

from .models import ARCHITECTURES

AUTO_CLASSES = {
    "bert": "AutoModelForSequenceClassification",
    "roberta": "AutoModelForSequenceClassification",
    "distilbert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "convnext": "AutoModelForImageClassification",
    "resnet": "AutoModelForImageClassification",
    "bert_tokens": "AutoModelForTokenClassification",
    "bert_choice": "AutoModelForMultipleChoice",
    "bert_qa": "AutoModelForQuestionAnswering",
    "bert_mlm": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "bart_decoder": "AutoModelForCausalLM",
    "xlnet": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "llava": "AutoModelForImageTextToText",
}


class BertWithABonus(tf.BertForSequenceClassification):
    """A user's own subclass, whose name no mapping lists."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_and_auto_class_come_from_the_architecture(name: str) -> None:
    model = ARCHITECTURES[name].model()
    assert head_of(model) is ARCHITECTURES[name].head
    assert auto_class_name(model) == AUTO_CLASSES[name]


def test_a_subclass_has_the_head_of_its_parent() -> None:
    model = BertWithABonus(ARCHITECTURES["bert"].model().config)
    assert head_of(model) is Head.CLASSIFICATION
    assert auto_class_name(model) == "AutoModelForSequenceClassification"


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2", "t5", "bert_qa"])
def test_wrappers_of_peft_and_compile_are_looked_through(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for wrapped in (adapted, torch.compile(model), torch.compile(adapted)):
        assert bare_model(wrapped) is model
        assert head_of(wrapped) is architecture.head
        assert auto_class_name(wrapped) == AUTO_CLASSES[name]


def test_an_unknown_architecture_has_no_head() -> None:
    codebooks = tf.MusicgenForCausalLM(
        tf.MusicgenDecoderConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    )
    for model in (nn.Linear(4, 3), nn.Sequential(), ARCHITECTURES["bert"].model().bert, codebooks):
        assert head_of(model) is None
        assert auto_class_name(model) is None


def test_an_encoder_decoder_among_image_text_models_does_not_shift() -> None:
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ARCHITECTURES["vit"].model().config, ARCHITECTURES["gpt2"].model().config
    )
    assert head_of(tf.VisionEncoderDecoderModel(config)) is Head.LM


def test_a_decoder_among_sequence_to_sequence_models_shifts() -> None:
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8}
    text = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "intermediate_size": 16, "model_type": "qwen2"}
    config = tf.Qwen2AudioConfig(
        audio_config={**audio, "model_type": "qwen2_audio_encoder"}, text_config=text, audio_token_index=63
    )
    model = tf.Qwen2AudioForConditionalGeneration(config)
    assert auto_class_name(model) == "AutoModelForSeq2SeqLM"
    assert head_of(model) is Head.CAUSAL_LM


@pytest.mark.parametrize("head", Head)
def test_heads_are_told_by_name(head: Head) -> None:
    assert Head(str(head)) is head
    assert head.has_named_classes == (head in ("classification", "token_classification"))
    assert head.has_vocabulary == (head in ("lm", "causal_lm"))
