"""Loading, making, adapting and saving a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retrain.config.model import ModelConfig
from retrain.models import load_policy, save_policy, train_tokenizer
from retrain.types import UserError
from runs import TAGS, corpus, model_section
from tiny import byte_tokenizer, tiny_gpt2, tiny_qwen3


def policy(seed: int = 0, **section: Any) -> Any:
    return load_policy(ModelConfig(**section), seed=seed)


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def test_from_scratch_depends_on_the_seed_only() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, same, other = (policy(seed, **model_section()) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, weights(one.model), weights(same.model)))
    assert not all(map(torch.equal, weights(one.model), weights(other.model)))
    assert one.model.config.vocab_size == len(one.tokenizer)
    assert one.base is None


def test_a_setting_that_the_architecture_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="qwen3 has no setting 'hiden_size'") as failure:
        policy(**model_section(hiden_size=3))
    assert "did you mean 'hidden_size'" in str(failure.value)


def test_an_unknown_architecture_is_refused() -> None:
    section = model_section()
    section["from_scratch"] |= {"model_type": "qwen99", "config": {}}
    with pytest.raises(UserError, match="no 'qwen99' model"):
        policy(**section)


def test_a_corpus_that_raises_is_the_users() -> None:
    section = model_section()
    section["from_scratch"]["tokenizer"]["params"] = {"bad": 1}
    with pytest.raises(UserError, match="runs:corpus raised TypeError"):
        policy(**section)


def test_dropout_is_off() -> None:
    gpt2 = policy(**model_section("gpt2")).model.train()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(gpt2(input_ids=ids).logits, gpt2(input_ids=ids).logits)


def test_the_tokenizer_keeps_digits_apart_and_tags_whole() -> None:
    tokenizer = train_tokenizer(corpus(), vocab_size=300, special_tokens=TAGS)
    text = "<code>12+345</code>é\n"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    assert pieces[:5] == ["<code>", "1", "2", "+", "3"] and "</code>" in pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text


def saved(tmp_path: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_saved_policy_loads_with_transformers(tmp_path: Path) -> None:
    for name, section in (("a", model_section()), ("b", model_section("gpt2"))):
        made = policy(**section)
        path = save_policy(made, tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert all(map(torch.equal, weights(made.model), weights(loaded)))
        tokenizer = AutoTokenizer.from_pretrained(path)
        text = "<code>1 + 1</code> What?"
        assert tokenizer.encode(text) == made.tokenizer.encode(text)
    save_policy(made, path)  # over the old one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        save_policy(policy(**model_section()), tmp_path / "file" / "x")


def test_a_tokenizer_without_a_pad_token_works(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token is None
    path = saved(tmp_path, tiny_qwen3(), tokenizer)
    loaded = policy(name_or_path=str(path))
    assert loaded.tokenizer.pad_token is None and loaded.base == str(path)


def test_a_relative_path_is_written_down_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, tiny_gpt2(), byte_tokenizer())
    monkeypatch.chdir(tmp_path)
    adapted = policy(name_or_path="m", peft={"r": 2, "target_modules": ["c_attn"]})
    path = save_policy(adapted, tmp_path / "adapter")
    monkeypatch.chdir("/")
    AutoModelForCausalLM.from_pretrained(path)


def test_lora_trains_the_adapter_only_and_is_seeded(tmp_path: Path) -> None:
    path = str(saved(tmp_path, tiny_qwen3(), byte_tokenizer()))
    one, same = (policy(3, name_or_path=path, peft={"r": 2}) for _ in range(2))
    names = [n for n, p in one.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert all(map(torch.equal, weights(one.model), weights(same.model)))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="'warp' is no device"):
        policy(**model_section(), device="warp")
