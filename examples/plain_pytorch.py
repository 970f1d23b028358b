"""A training loop in plain PyTorch: the model, the optimizer and the loop are yours.

    python examples/plain_pytorch.py gpt2     # or qwen3

The model is made on the spot and knows nothing; it learns to answer with digits.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from retrain import GRPO, ModelGenerate, QASolverEnv, Rollout
from retrain.models.tokenizer import train_tokenizer


def make_model(architecture: str, tokenizer: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    vocab, end = len(tokenizer), tokenizer.eos_token_id
    if architecture == "gpt2":
        gpt2 = GPT2Config(
            vocab_size=vocab, n_positions=64, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=end, eos_token_id=end,
        )  # fmt: skip
        return GPT2LMHeadModel(gpt2)
    qwen3 = Qwen3Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=end,
    )  # fmt: skip
    return Qwen3ForCausalLM(qwen3)


def share_of_digits(rollout: Rollout) -> float:
    said = rollout.completion
    return sum(character in "0123456789" for character in said) / max(len(said), 1)


def main(architecture: str = "gpt2", steps: int = 40) -> None:
    tokenizer = train_tokenizer(["2 + 3? 4 + 5?"], vocab_size=270)
    model = make_model(architecture, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generate = ModelGenerate(model, tokenizer, max_new_tokens=8, temperature=1.0)
    grpo = GRPO(model, tokenizer, eps=0.2)
    env = QASolverEnv()

    for step in range(1, steps + 1):
        questions = [f"{step % 10} + {other}?" for other in (1, 2)]
        rollouts = [env.setup(question) for question in questions for _ in range(8)]
        generate.batch_rollout_generate_response(rollouts)
        rewards = [share_of_digits(rollout) for rollout in rollouts]
        for _ in range(2):
            loss = grpo.calculate_loss(rollouts, rewards)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if step == 1 or step % 10 == 0:
            print(f"step {step}: reward {sum(rewards) / len(rewards):.2f}")
    generate.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
