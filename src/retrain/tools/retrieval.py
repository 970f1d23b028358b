"""The retrieval tool: BM25 over a corpus on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrain.tools.base import ModelError
from retrain.tools.corpus import write_rows
from retrain.tools.index_dir import default_directory
from retrain.tools.passages import Columns, Passage, PassageIndex, open_index
from retrain.tools.signature import read_signature
from retrain.tools.threads import in_daemon_thread
from retrain.types import UserError

INLINE_PASSAGES = 20_000
"""Up to here a search takes a fraction of a millisecond, and a thread would cost more."""

NOTHING = "No passage has any of these words."


class RetrievalTool:
    """Answers `query` with the passages that fit it best by BM25, one a line, numbered.

    A line is `Doc 1 (Title: Oslo) Oslo is the capital of Norway.`, with what the corpus has of an
    id and a title in the brackets. Equal scores keep the order of the corpus. A query without a
    word to search for is the model's fault. All environments of a process share one index.
    """

    def __init__(
        self,
        corpus: str | Path | Sequence[str | Path],
        *,
        corpus_params: Mapping[str, Any] | None = None,
        text_column: str = "text",
        title_column: str | None = None,
        id_column: str | None = None,
        top_k: int = 3,
        max_passage_chars: int = 1000,
        language: str | None = "english",
        index_dir: str | Path | None = None,
        name: str = "search",
        description: str | None = None,
    ) -> None:
        """Open the index; where there is none yet, build it (docs/tools.md says how long it takes).

        Args:
            corpus: a JSONL file or several, one object with `text_column` a line; or an import
                path, `pkg.module:name`, of a function that returns such objects.
            corpus_params: keyword arguments of that function.
            title_column: searched along with the text, and shown.
            id_column: shown, not searched.
            top_k: most passages of an answer.
            max_passage_chars: of one passage; the rest is left out at the end of a word.
            language: its stop words are not searched for, and English plurals count as their
                singulars; None: every word counts as it is written.
            index_dir: where indexes are kept; by default `retrain/indexes` in the user's cache.
            name: what the model calls the tool.
            description: in place of the default one.

        Raises:
            UserError: a file or line that is not a corpus, or a parameter that does not fit.
        """
        for key, value in (("top_k", top_k), ("max_passage_chars", max_passage_chars)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"retrieval: {key} is {value!r}", "Give a number above zero.")
        directory = default_directory() if index_dir is None else Path(index_dir).expanduser()
        self.index = open_index(
            _files(corpus, corpus_params, directory),
            Columns(text_column, title_column, id_column),
            language=language,
            directory=directory,
        )
        self.name = name
        self.description = description or (
            f"Search {len(self.index):,} passages by their words. "
            f"Returns the {top_k} that fit best."
        )
        self.parameters = _SIGNATURE.parameters
        self._session = RetrievalSession(self.index, top_k, max_passage_chars)

    def session(self) -> RetrievalSession:
        return self._session


class RetrievalSession:
    """Has no state: all rollouts share it."""

    def __init__(self, index: PassageIndex, top_k: int, max_passage_chars: int) -> None:
        self._index = index
        self._top_k = top_k
        self._max_passage_chars = max_passage_chars

    async def call(self, arguments: Mapping[str, Any]) -> str:
        _, bound = _SIGNATURE.bind(arguments)
        query: str = bound["query"]
        if not query.strip():
            raise ModelError("The query is empty.")
        words = self._index.words(query)
        if not words:
            raise ModelError("The query has no word to search for.")
        if len(self._index) <= INLINE_PASSAGES:
            found = self._index.search(words, self._top_k)
        else:
            found = await in_daemon_thread(lambda: self._index.search(words, self._top_k))
        return show_passages(found, self._max_passage_chars) or NOTHING

    async def close(self) -> None:
        return None


def _files(
    corpus: str | Path | Sequence[str | Path], params: Mapping[str, Any] | None, directory: Path
) -> list[Path]:
    """The files that a corpus is; those of a function are written to `directory`."""
    files = [corpus] if isinstance(corpus, str | Path) else list(corpus)
    if not files:
        raise UserError("retrieval: corpus lists no file", "Name at least one JSONL file.")
    if isinstance(corpus, str) and ":" in corpus and not Path(corpus).exists():
        return [write_rows(corpus, params or {}, directory)]
    if params:
        raise UserError(
            "retrieval: corpus_params needs corpus to be an import path",
            "Write pkg.module:name, or remove corpus_params.",
        )
    return [Path(file).expanduser() for file in files]


def show_passages(passages: Sequence[Passage], max_passage_chars: int) -> str:
    """One a line, numbered from 1; white space, line ends too, becomes single spaces."""
    lines = []
    for number, passage in enumerate(passages, 1):
        parts = (f"Doc {number}", _about(passage), cut(passage.text, max_passage_chars))
        lines.append(" ".join(part for part in parts if part))
    return "\n".join(lines)


def _about(passage: Passage) -> str:
    named = {"Id": passage.id, "Title": passage.title}
    parts = [f"{name}: {' '.join(value.split())}" for name, value in named.items() if value]
    return f"({', '.join(parts)})" if parts else ""


def cut(text: str, most: int) -> str:
    """The text in single spaces, at most `most` characters and an ellipsis."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    whole_words = text[: most + 1].rpartition(" ")[0]
    return f"{whole_words or text[:most]} …"


def _query(query: str) -> None:
    """
    Args:
        query: words to look for
    """


_SIGNATURE = read_signature(_query, "tool 'retrieval'")
