"""Tiny random models of many architectures, without dropout, and batches of 8 labelled examples that fit them.

model, batch = ARCHITECTURES["bert"](seed=0)
teacher = ARCHITECTURES["bert"].model(seed=1, hidden_size=32)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hf_dkd.heads import Head

EXAMPLES, LENGTH, TARGET_LENGTH, IMAGE_SIZE, VOCABULARY, CLASSES, CHOICES = 8, 12, 10, 16, 64, 5, 3
PAD, IMAGE_TOKEN, IMAGE_TOKENS = 0, 63, 4

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "num_labels": CLASSES,
}
_VIT = {
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}
_CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4, "num_labels": CLASSES}
_RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": CLASSES,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_XLNET = {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "dropout": 0.0}


@dataclass(frozen=True)
class Architecture:
    """A model class with a tiny config, and examples for it; called, it gives a model and a batch."""

    head: Head
    model_class: type[nn.Module]
    config: Callable[..., Any]
    settings: dict[str, Any]
    examples: Callable[[torch.Generator], dict[str, Tensor]]

    def model(self, seed: int = 0, **changes: Any) -> Any:
        """A model of random weights, wide enough for its logits to differ. `changes` go to its config."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.model_class(self.config(**self.settings | changes))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=0.2)
        return model

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """Eight labelled examples."""
        return self.examples(torch.Generator().manual_seed(seed))

    def __call__(self, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
        return self.model(seed), self.batch(seed)


def _integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def _ragged(values: Tensor, generator: torch.Generator, fill: int, shortest: int = 4) -> Tensor:
    """`values` (..., L) with `fill` behind each row's own length."""
    lengths = _integers(generator, shortest, values.shape[-1] + 1, *values.shape[:-1], 1)
    return values.masked_fill(torch.arange(values.shape[-1]) >= lengths, fill)


def _text(generator: torch.Generator, *shape: int) -> dict[str, Tensor]:
    ids = _ragged(_integers(generator, 3, IMAGE_TOKEN, *(shape or (EXAMPLES, LENGTH))), generator, PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _some_positions(values: Tensor, generator: torch.Generator) -> Tensor:
    return values.masked_fill(torch.rand(values.shape, generator=generator) < 0.5, -100)


def _text_classes(generator: torch.Generator) -> dict[str, Tensor]:
    return {**_text(generator), "labels": _integers(generator, 0, CLASSES, EXAMPLES)}


def _images(generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(EXAMPLES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixels, "labels": _integers(generator, 0, CLASSES, EXAMPLES)}


def _tagged_text(generator: torch.Generator) -> dict[str, Tensor]:
    text = _text(generator)
    tags = _integers(generator, 0, CLASSES, EXAMPLES, LENGTH).masked_fill(text["input_ids"] == PAD, -100)
    return {**text, "labels": _some_positions(tags, generator)}


def _masked_text(generator: torch.Generator) -> dict[str, Tensor]:
    text = _text(generator)
    words = text["input_ids"].masked_fill(text["input_ids"] == PAD, -100)
    return {**text, "labels": _some_positions(words, generator)}


def _prompted_text(generator: torch.Generator) -> dict[str, Tensor]:
    text = _text(generator)
    prompt = torch.arange(LENGTH) < _integers(generator, 0, 3, EXAMPLES, 1)
    return {**text, "labels": text["input_ids"].masked_fill(prompt | (text["input_ids"] == PAD), -100)}


def _captioned_images(generator: torch.Generator) -> dict[str, Tensor]:
    text = _text(generator)
    tokens = torch.full((EXAMPLES, IMAGE_TOKENS), IMAGE_TOKEN)
    words = text["input_ids"].masked_fill(text["input_ids"] == PAD, -100)
    return {
        "pixel_values": torch.randn(EXAMPLES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "input_ids": torch.cat((tokens, text["input_ids"]), dim=1),
        "attention_mask": torch.cat((torch.ones_like(tokens), text["attention_mask"]), dim=1),
        "labels": torch.cat((torch.full_like(tokens, -100), words), dim=1),
    }


def _translations(generator: torch.Generator) -> dict[str, Tensor]:
    target = _integers(generator, 3, VOCABULARY, EXAMPLES, TARGET_LENGTH)
    return {**_text(generator), "labels": _ragged(target, generator, -100)}


def _choices(generator: torch.Generator) -> dict[str, Tensor]:
    return {**_text(generator, EXAMPLES, CHOICES, LENGTH), "labels": _integers(generator, 0, CHOICES, EXAMPLES)}


def _answers(generator: torch.Generator) -> dict[str, Tensor]:
    text = _text(generator)
    start = _integers(generator, 0, 2, EXAMPLES)
    return {**text, "start_positions": start, "end_positions": start + _integers(generator, 0, 2, EXAMPLES)}


def _llava_config(vocab_size: int = VOCABULARY, **changes: Any) -> tf.LlavaConfig:
    size = {name: _VIT[name] for name in ("image_size", "patch_size", "hidden_size", "intermediate_size")}
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**size, num_hidden_layers=2, num_attention_heads=2),
        text_config=tf.LlamaConfig(**_LLAMA | {"vocab_size": vocab_size}),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        **changes,
    )


ARCHITECTURES = {
    "bert": Architecture(Head.CLASSIFICATION, tf.BertForSequenceClassification, tf.BertConfig, _BERT, _text_classes),
    "roberta": Architecture(
        Head.CLASSIFICATION, tf.RobertaForSequenceClassification, tf.RobertaConfig, _BERT, _text_classes
    ),
    "distilbert": Architecture(
        Head.CLASSIFICATION, tf.DistilBertForSequenceClassification, tf.DistilBertConfig, _DISTILBERT, _text_classes
    ),
    "vit": Architecture(Head.CLASSIFICATION, tf.ViTForImageClassification, tf.ViTConfig, _VIT, _images),
    "convnext": Architecture(
        Head.CLASSIFICATION, tf.ConvNextForImageClassification, tf.ConvNextConfig, _CONVNEXT, _images
    ),
    "resnet": Architecture(Head.CLASSIFICATION, tf.ResNetForImageClassification, tf.ResNetConfig, _RESNET, _images),
    "bert_tokens": Architecture(
        Head.TOKEN_CLASSIFICATION, tf.BertForTokenClassification, tf.BertConfig, _BERT, _tagged_text
    ),
    "bert_choice": Architecture(Head.MULTIPLE_CHOICE, tf.BertForMultipleChoice, tf.BertConfig, _BERT, _choices),
    "bert_qa": Architecture(
        Head.QUESTION_ANSWERING, tf.BertForQuestionAnswering, tf.BertConfig, _BERT | {"num_labels": 2}, _answers
    ),
    "bert_mlm": Architecture(Head.LM, tf.BertForMaskedLM, tf.BertConfig, _BERT, _masked_text),
    "t5": Architecture(Head.LM, tf.T5ForConditionalGeneration, tf.T5Config, _T5, _translations),
    "bart": Architecture(Head.LM, tf.BartForConditionalGeneration, tf.BartConfig, _BART, _translations),
    "bart_decoder": Architecture(Head.LM, tf.BartForCausalLM, tf.BartConfig, _BART, _prompted_text),
    "xlnet": Architecture(Head.LM, tf.XLNetLMHeadModel, tf.XLNetConfig, _XLNET, _prompted_text),
    "gpt2": Architecture(Head.CAUSAL_LM, tf.GPT2LMHeadModel, tf.GPT2Config, _GPT2, _prompted_text),
    "llama": Architecture(Head.CAUSAL_LM, tf.LlamaForCausalLM, tf.LlamaConfig, _LLAMA, _prompted_text),
    "llava": Architecture(Head.CAUSAL_LM, tf.LlavaForConditionalGeneration, _llava_config, {}, _captioned_images),
}
