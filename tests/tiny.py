"""Tiny seeded models and a byte-level tokenizer, made in code."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 300


def seeded(model_class: Any, config: Any, seed: int = 0) -> Any:
    """A model of this class in evaluation mode, spread out enough that tokens differ."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def tiny_qwen3(seed: int = 0, vocab_size: int = VOCAB, context: int = 256) -> Qwen3ForCausalLM:
    """Tied embeddings, grouped key/value heads."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        rope_theta=1000.0,
        tie_word_embeddings=True,
    )
    model: Qwen3ForCausalLM = seeded(Qwen3ForCausalLM, config, seed)
    return model


def tiny_llama(seed: int = 0, vocab_size: int = VOCAB, context: int = 256) -> LlamaForCausalLM:
    """Untied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    model: LlamaForCausalLM = seeded(LlamaForCausalLM, config, seed)
    return model


def tiny_gpt2(seed: int = 0, vocab_size: int = VOCAB, context: int = 256) -> GPT2LMHeadModel:
    """Learned absolute positions."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: GPT2LMHeadModel = seeded(GPT2LMHeadModel, config, seed)
    return model


def byte_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), special: tuple[str, ...] = ("<eos>",)
) -> PreTrainedTokenizerFast:
    """One token per byte, plus one per merge (in the byte alphabet: a space is "Ġ"), plus
    `special` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(alphabet)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>" if "<eos>" in special else None
    )
