"""A tiny Llama and its tokenizer, made so that HunyuanVideoPipeline's default prompt template works unchanged."""

from __future__ import annotations

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from emoji_text import LENGTH, WIDTH
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

CROP = DEFAULT_PROMPT_TEMPLATE["crop_start"]  # tokens the pipeline cuts off in front
PREFIX = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]


def llama(captions: list[str]) -> tuple[PreTrainedTokenizerFast, LlamaModel]:
    """A word tokenizer and a four-layer Llama; hidden states (B, tokens, 128).

    The pipeline wraps every caption in a long instruction and cuts 95 tokens off. Here the instruction is one token
    and 94 begin tokens stand before it, so that exactly those 95 go. It reads the third layer from the end.
    """
    words = sorted({w for c in captions for w in c.lower().replace(",", " , ").split()})
    special = ["<pad>", "<s>", "<unk>", "<|eot_id|>", PREFIX]
    vocabulary = {w: i for i, w in enumerate([*special, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(",", "isolated")]
    )
    inner.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    front = " ".join(["<s>"] * (CROP - 1))
    inner.post_processor = processors.TemplateProcessing(single=f"{front} $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", eos_token="<|eot_id|>",
        padding_side="right", model_max_length=CROP + 256,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=3,
    )  # fmt: skip
    return tokenizer, LlamaModel(config)


def llama_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, 95 + LENGTH), as the pipeline asks for them with `max_sequence_length=LENGTH`."""
    texts = [DEFAULT_PROMPT_TEMPLATE["template"].format(c) for c in captions]
    out = tokenizer(texts, padding="max_length", max_length=CROP + LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask
