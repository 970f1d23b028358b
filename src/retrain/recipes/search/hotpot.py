"""A corpus from HotpotQA itself: the paragraphs that its questions come with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retrain.data.hub import read_dataset


def passages(
    path: str = "hotpotqa/hotpot_qa",
    *,
    name: str | None = "distractor",
    splits: Sequence[str] = ("train", "validation"),
) -> Iterator[dict[str, str]]:
    """Rows with title and text, each paragraph once: two of a question's ten hold its answer.

    Raises:
        UserError: `datasets` or the dataset is missing.
    """
    seen: set[tuple[str, str]] = set()
    for split in splits:
        for row in read_dataset(path, name=name, split=split):
            context = row.columns["context"]
            for title, sentences in zip(context["title"], context["sentences"], strict=True):
                text = "".join(sentences).strip()
                if (title, text) not in seen:
                    seen.add((title, text))
                    yield {"title": title, "text": text}
