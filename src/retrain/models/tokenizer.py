"""A tokenizer made on the spot: byte-level BPE, single digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    corpus: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = ()
) -> Any:
    """A fast transformers tokenizer trained on `corpus`.

    Every byte is in the alphabet, so any text can be written. Digits never merge. `special_tokens`
    are kept whole wherever they occur. `<|endoftext|>` ends and pads.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END_OF_TEXT, *(t for t in special_tokens if t != END_OF_TEXT)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=specials[1:],
        clean_up_tokenization_spaces=False,
    )
