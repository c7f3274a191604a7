import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from hf_dkd.heads import Head, auto_class_name, bare_model, head_of
from hf_dkd.rows import aligned_labels, logits_of

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


_TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_ONE_CONVOLUTION = {
    "conv_dim": (16,),
    "conv_stride": (5,),
    "conv_kernel": (10,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

# Classifiers of video and audio: a model, a batch of two inputs, and the Auto class.
VIDEO_AND_AUDIO = {
    "videomae": (
        tf.VideoMAEForVideoClassification,
        tf.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, num_labels=5, **_TRANSFORMER),
        {"pixel_values": torch.zeros(2, 4, 3, 16, 16)},
        "AutoModelForVideoClassification",
    ),
    "wav2vec2": (
        tf.Wav2Vec2ForSequenceClassification,
        tf.Wav2Vec2Config(num_labels=5, **_ONE_CONVOLUTION, **_TRANSFORMER),
        {"input_values": torch.zeros(2, 400)},
        "AutoModelForAudioClassification",
    ),
    "ast": (
        tf.ASTForAudioClassification,
        tf.ASTConfig(patch_size=4, max_length=16, num_mel_bins=16, num_labels=5, **_TRANSFORMER),
        {"input_values": torch.zeros(2, 16, 16)},
        "AutoModelForAudioClassification",
    ),
}


class BertWithABonus(tf.BertForSequenceClassification):
    """A user's own subclass, whose name no mapping lists."""


class OwnConfig(tf.PreTrainedConfig):
    model_type = "own"


class OwnModel(tf.PreTrainedModel):
    """A user's own architecture."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(4, config.num_labels)
        self.post_init()


class OwnModelWithABonus(OwnModel):
    """A subclass of the class that is registered."""


class OwnBody(tf.PreTrainedModel):
    """Shares the configuration of the class that is registered, not its head."""

    config_class = OwnConfig


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_and_auto_class_come_from_the_architecture(name: str) -> None:
    model = ARCHITECTURES[name].model()
    assert head_of(model) is ARCHITECTURES[name].head
    assert auto_class_name(model) == AUTO_CLASSES[name]


@pytest.mark.parametrize("name", VIDEO_AND_AUDIO)
def test_video_and_audio_classifiers_have_a_row_an_example(name: str) -> None:
    model_class, config, inputs, auto_class = VIDEO_AND_AUDIO[name]
    model, labels = model_class(config).eval(), torch.tensor([0, 3])
    assert head_of(model) is Head.CLASSIFICATION
    assert auto_class_name(model) == auto_class
    outputs = model(**inputs, labels=labels)
    rows = logits_of(outputs, "student")
    assert rows.shape == (2, 5)
    assert torch.equal(aligned_labels(Head.CLASSIFICATION, {**inputs, "labels": labels}), labels)
    # The head's own loss is the mean over those rows.
    assert torch.allclose(cross_entropy(rows, labels), outputs.loss)


def test_a_subclass_has_the_head_of_its_parent() -> None:
    model = BertWithABonus(ARCHITECTURES["bert"].model().config)
    assert head_of(model) is Head.CLASSIFICATION
    assert auto_class_name(model) == "AutoModelForSequenceClassification"


@pytest.mark.parametrize(
    ("auto_class", "head"),
    [
        ("AutoModelForImageClassification", Head.CLASSIFICATION),
        ("AutoModelForTokenClassification", Head.TOKEN_CLASSIFICATION),
        ("AutoModelForCausalLM", None),
        ("AutoModelForMaskedLM", None),
    ],
)
def test_a_registered_class_has_the_head_of_its_auto_class(
    auto_class: str, head: Head | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OwnModel(OwnConfig())
    assert head_of(model) is None
    mapping = getattr(tf, auto_class)._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    getattr(tf, auto_class).register(OwnConfig, OwnModel)
    for registered in (model, torch.compile(model)):
        assert head_of(registered) is head
        assert auto_class_name(registered) == (auto_class if head else None)
    assert head_of(OwnModelWithABonus(OwnConfig())) is head
    assert head_of(OwnBody(OwnConfig())) is None
    model.config.problem_type = "multi_label_classification"
    assert head_of(model) is (Head.MULTI_LABEL if head is Head.CLASSIFICATION else head)
    assert head_of(nn.Linear(4, 3)) is None


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
    assert head.has_named_classes == (head in ("classification", "multi_label", "token_classification"))
    assert head.has_vocabulary == (head in ("lm", "causal_lm"))
