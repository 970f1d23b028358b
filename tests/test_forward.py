from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from retrain.models.forward import (
    decoder_hidden,
    evaluating,
    head_logits,
    splits_exactly,
)
from retrain.models.scores import selected_logprobs
from tiny import VOCAB, seeded, tiny_gpt2, tiny_llama, tiny_qwen3

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def tiny_gemma2() -> Any:
    config = Gemma2Config(
        **SMALL, head_dim=8, sliding_window=8, final_logit_softcapping=2.0,
        attn_logit_softcapping=None,
    )  # fmt: skip
    return seeded(Gemma2ForCausalLM, config)


def tiny_cohere() -> Any:
    return seeded(CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25))


def tiny_granite() -> Any:
    return seeded(GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=4.0))


def tiny_mamba() -> Any:
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0
    )
    return seeded(MambaForCausalLM, config)


def tiny_lora() -> Any:
    model = get_peft_model(
        tiny_qwen3(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


EVERY = [
    tiny_qwen3, tiny_llama, tiny_gpt2, tiny_gemma2, tiny_cohere, tiny_granite, tiny_mamba,
    tiny_lora,
]  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, (3, 14), generator=generator)
    lengths = torch.tensor([14, 5, 9])
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    mask = torch.rand(3, 14, generator=generator) < 0.5
    mask &= torch.arange(14) < lengths.unsqueeze(1)
    mask[:, 0] = False
    return ids, lengths, mask


def reference(
    model: Any, ids: torch.Tensor, lengths: torch.Tensor, temperature: float
) -> torch.Tensor:
    """One row at a time, unpadded, through the model's own forward pass."""
    out = torch.zeros(ids.shape)
    for row, length in enumerate(lengths.tolist()):
        own = ids[row : row + 1, :length]
        logprobs = (model(input_ids=own).logits[0].float() / temperature).log_softmax(-1)
        out[row, 1:length] = logprobs[:-1].gather(1, own[0, 1:, None]).squeeze(1)
    return out


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_selected_logprobs_match_the_models_own_logits(make: Any) -> None:
    model = make()
    ids, lengths, mask = batch()
    with torch.no_grad():
        found = selected_logprobs(model, ids, lengths, mask, 0.7)
        expected = reference(model, ids, lengths, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected * mask, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_decoder_and_head_are_the_model(make: Any) -> None:
    model = make()
    assert splits_exactly(model)
    ids, _, _ = batch()
    with torch.no_grad():
        found = head_logits(model, decoder_hidden(model, ids))
        torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_an_unusual_head_uses_the_whole_model() -> None:
    model = tiny_llama()
    plain = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 3, VOCAB)
        return output

    model.forward = shifted
    assert not splits_exactly(model)
    ids, lengths, mask = batch()
    with torch.no_grad():
        found = selected_logprobs(model, ids, lengths, mask)
        torch.testing.assert_close(
            found, reference(model, ids, lengths, 1.0) * mask, atol=1e-5, rtol=0
        )


def test_chunks_do_not_change_values_or_gradients() -> None:
    model = tiny_qwen3().double()
    ids, lengths, mask = batch()
    results = []
    for chunk in (1 << 23, 3 * VOCAB):
        model.zero_grad()
        logprobs = selected_logprobs(model, ids, lengths, mask, 0.7, logits_per_chunk=chunk)
        (logprobs * torch.linspace(-1, 1, 14)).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((logprobs.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] and any(g.abs().max() > 0.1 for g in results[0][1])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_gradient_equals_that_of_the_full_logits() -> None:
    model = tiny_qwen3()
    ids, lengths, mask = batch()
    weights = torch.linspace(-1, 1, 14) * mask

    def gradient(logprobs: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (logprobs * weights).sum().backward()
        found = model.get_input_embeddings().weight.grad
        assert found is not None
        return found.clone()

    expected = gradient(reference(model, ids, lengths, 1.0))
    found = gradient(selected_logprobs(model, ids, lengths, mask, logits_per_chunk=4 * VOCAB))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 5)])
def test_a_mask_on_a_first_token_or_padding_is_refused(row: int, column: int) -> None:
    ids, lengths, mask = batch()
    mask[row, column] = True
    with pytest.raises(ValueError, match="first token or padding"):
        selected_logprobs(tiny_llama(), ids, lengths, mask)


def test_an_empty_mask_gives_zeros() -> None:
    ids, lengths, mask = batch()
    found = selected_logprobs(tiny_llama(), ids, lengths, torch.zeros_like(mask))
    assert found.shape == ids.shape and not found.any()


def test_evaluating_restores_each_modules_flag() -> None:
    model = tiny_llama().train()
    model.lm_head.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.model.training and not model.lm_head.training
