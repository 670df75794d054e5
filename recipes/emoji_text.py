"""Tokenizers and tiny text encoders with a vocabulary of our own, in the classes the pipelines expect."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

WIDTH = 128
LENGTH = 12  # tokens; the longest caption takes 15


def t5(captions: list[str]) -> tuple[T5TokenizerFast, T5EncoderModel]:
    """A Unigram tokenizer of 4,000 pieces and a two-layer encoder; hidden states (B, tokens, 128)."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=4000, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=12
    )
    unigram.train_from_iterator(captions, trainer)
    pieces = [tuple(piece) for piece in _state(unigram)["vocab"]]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)


def clip(captions: list[str], length: int = LENGTH) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """A byte-pair tokenizer of 4,000 entries, a two-layer encoder of up to `length` tokens; pooled state (B, 128)."""
    pairs = CLIPTokenizer()._tokenizer  # CLIP's own normaliser and splitter, so that training sees what use will see
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer, learner.pre_tokenizer = pairs.normalizer, pairs.pre_tokenizer
    learner.train_from_iterator(captions, trainer)
    state = _state(learner)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    tokenizer = CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=length)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=length, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, CLIPTextModel(config)


def ids(tokenizer: T5TokenizerFast | CLIPTokenizer, captions: list[str]) -> object:
    """Token ids (B, LENGTH), padded as the pipelines pad."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def _state(tokenizer: Tokenizer) -> dict[str, object]:
    import json

    state: dict[str, object] = json.loads(tokenizer.to_str())["model"]
    return state
