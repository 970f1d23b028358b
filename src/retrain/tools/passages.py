"""Passages on disk and a BM25 index over them: built once, memory-mapped ever after.

An index is a directory named by the hash of what it was made of, so a changed corpus, another
setting or another version of the library has another index. It is written aside, checked and
renamed: what carries the name is whole and of that content. Of processes that want to build one
index the first does, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrain.tools.index_dir import alone, lock_of, sweep, writing
from retrain.types import UserError

FORMAT = 1
"""Of the files below; part of an index's name."""
MANIFEST, TEXTS, OFFSETS = "manifest.json", "passages.jsonl", "offsets.npy"
_BOM = b"\xef\xbb\xbf"
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    text: str
    title: str = ""
    id: str = ""


@dataclass(frozen=True)
class Columns:
    """Where a row keeps what."""

    text: str
    title: str | None
    id: str | None


class Words:
    """The words of a text as the index counts them: lower case, stop words left out, and an
    English plural as its singular."""

    def __init__(self, language: str | None) -> None:
        """
        Raises:
            UserError: bm25s has no stop words of the language, or is not installed.
        """
        bm25s = _library()
        try:
            stop = bm25s.tokenization.Tokenizer(stopwords=language).stopwords
        except ValueError as error:
            raise UserError(f"retrieval: language {language!r}: {error}", "Or use null.") from None
        self._stop = frozenset(stop)
        self._is_english = language == "english"

    def __call__(self, text: str) -> list[str]:
        words = (word for word in _WORD.findall(text.lower()) if word not in self._stop)
        return [singular(word) for word in words] if self._is_english else list(words)


@functools.lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """The "S stemmer" of Harman, How Effective Is Suffixing? (1991)."""
    if word.endswith("ies"):
        return word if word.endswith(("eies", "aies")) else word[:-3] + "y"
    if word.endswith("es"):
        return word if word.endswith(("aes", "ees", "oes")) else word[:-1]
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) else word


class PassageIndex:
    """An index that lies in a directory; processes that open it share its pages in memory.

    Safe to search from several threads.
    """

    def __init__(self, place: Path, words: Words) -> None:
        self._words = words
        self._scorer = _library().BM25.load(place, mmap=True, show_progress=False)
        self._texts = np.memmap(place / TEXTS, dtype=np.uint8, mode="r")
        self._offsets = np.load(place / OFFSETS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Passage:
        start, end = self._offsets[index : index + 2]
        return Passage(**json.loads(self._texts[start:end].tobytes()))

    def words(self, query: str) -> list[str]:
        """What of a query is searched for; a word said twice counts once."""
        return list(dict.fromkeys(self._words(query)))

    def search(self, words: Sequence[str], top_k: int) -> list[Passage]:
        """The passages that score highest, of those that have any of the words; of equal ones the
        first in the corpus."""
        ids = self._scorer.get_tokens_ids(words)
        if not ids:
            return []
        scores: npt.NDArray[np.float32] = self._scorer.get_scores_from_ids(ids)
        return [self[index] for index in highest(scores, top_k)]


def highest(scores: npt.NDArray[np.float32], count: int) -> list[int]:
    """Indices of the `count` highest scores above zero, of scores [N]; ties in order of index."""
    least = 0.0 if count >= len(scores) else np.partition(scores, -count)[-count]
    found = np.flatnonzero((scores >= least) & (scores > 0))
    best: list[int] = found[np.argsort(-scores[found], kind="stable")][:count].tolist()
    return best


def open_index(
    files: Sequence[Path], columns: Columns, *, language: str | None, directory: Path
) -> PassageIndex:
    """The index of these files, built if `directory` has none; one object in a process.

    Raises:
        UserError: a file cannot be read, a line of it is no passage, or the index cannot be
            written.
    """
    states = list(map(_state, files))
    paths = tuple(path for path, _, _ in states)
    known = (paths, columns, language, directory.absolute())
    with lock_of(known):
        if known not in _opened or _opened[known][0] != states:
            _opened[known] = (states, _open_or_build(files, columns, language, directory))
        return _opened[known][1]


def _state(file: Path) -> _State:
    """What tells whether a file may have changed since it was last looked at."""
    if not file.is_file():
        raise UserError(f"retrieval: no such file: {file}", f"Looked for {file.absolute()}.")
    state = file.stat()
    return file.resolve(), state.st_size, state.st_mtime_ns


_State = tuple[Path, int, int]
_opened: dict[object, tuple[list[_State], PassageIndex]] = {}
"""By paths and settings, with the state that the files were in."""


def _open_or_build(
    files: Sequence[Path], columns: Columns, language: str | None, directory: Path
) -> PassageIndex:
    words = Words(language)
    content = _content_hash(files)
    settings = [FORMAT, _library().__version__, asdict(columns), language, content]
    place = directory / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    if not _is_whole(place):  # a whole one is never moved, so it is opened without the lock
        with alone(place):
            if not _is_whole(place):
                _build_aside(files, columns, words, place, content)
    return PassageIndex(place, words)


def _content_hash(files: Sequence[Path]) -> list[str]:
    hashes = []
    for file in files:
        with _reading(file), file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashes


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror or error}", "Check the file."
        ) from error


def _is_whole(place: Path) -> bool:
    """Whether all that its manifest lists is there in full size."""
    try:
        sizes: dict[str, int] = json.loads((place / MANIFEST).read_text())
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _build_aside(
    files: Sequence[Path], columns: Columns, words: Words, place: Path, content: list[str]
) -> None:
    """Build in a directory of our own, and give it the name if it is of the content."""
    aside = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        with writing(place.parent):
            sweep(place.parent)
            aside.mkdir()
            _write(files, columns, words, aside)
            if _content_hash(files) != content:
                raise UserError(
                    f"{_listed(files)}: changed while it was being indexed", "Run again."
                )
            _move(aside, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move(aside: Path, place: Path) -> None:
    """Rename, unless a whole index is there: of a process that could not be locked out."""
    if not _is_whole(place) and place.exists():
        broken = place.with_name(f"{aside.name}.broken")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            place.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        aside.rename(place)
    except OSError:
        if not _is_whole(place):
            raise


def _write(files: Sequence[Path], columns: Columns, words: Words, directory: Path) -> None:
    """The passages, the index, and at last the manifest, all on the disk."""
    vocabulary: dict[str, int] = {}
    documents: list[list[int]] = []
    offsets = [0]
    with (directory / TEXTS).open("wb") as stream:
        for passage in read_passages(files, columns):
            found = words(f"{passage.title} {passage.text}")
            documents.append([vocabulary.setdefault(word, len(vocabulary)) for word in found])
            line = json.dumps(asdict(passage), ensure_ascii=False).encode() + b"\n"
            offsets.append(offsets[-1] + stream.write(line))
    if not vocabulary:
        raise UserError(f"{_listed(files)}: no passage has a word to search for", "Add some.")
    np.save(directory / OFFSETS, np.array(offsets, dtype=np.int64))
    scorer = _library().BM25()
    scorer.index((documents, vocabulary), create_empty_token=False, show_progress=False)
    scorer.save(directory, show_progress=False)
    written = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps(written))
    for path in (*directory.iterdir(), directory):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_passages(files: Sequence[Path], columns: Columns) -> Iterator[Passage]:
    """The passages of JSONL files, in order; empty lines are skipped.

    Raises:
        UserError: a file cannot be read, or a line is not an object with the columns.
    """
    for file in files:
        with _reading(file), file.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if line := raw.removeprefix(_BOM if number == 1 else b"").strip():
                    yield _passage(line, columns, f"{file}, line {number}")


def _passage(line: bytes, columns: Columns, place: str) -> Passage:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON: {error}", "Repair or remove it.") from error
    if not isinstance(row, dict):
        raise UserError(
            f"{place}: expected an object, found {type(row).__name__}",
            f'A passage looks like {{"{columns.text}": "Oslo is the capital of Norway."}}.',
        )
    text = _cell(row, columns.text, "text_column", place)
    if not isinstance(text, str):
        raise UserError(
            f"{place}: column {columns.text!r} must hold text, found {type(text).__name__}",
            "Repair or remove it.",
        )
    title = _cell(row, columns.title, "title_column", place)
    id = _cell(row, columns.id, "id_column", place)
    return Passage(*("" if cell is None else _encodable(str(cell)) for cell in (text, title, id)))


def _cell(row: dict[str, Any], column: str | None, param: str, place: str) -> Any:
    if column is None:
        return None
    if column not in row:
        has = ", ".join(map(repr, row)) or "no columns"
        raise UserError(f"{place}: there is no column {column!r}", f"Set {param}; it has: {has}.")
    return row[column]


def _encodable(text: str) -> str:
    """Without lone surrogates, which JSON escapes can make."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def _library() -> Any:
    try:
        import bm25s
        import bm25s.tokenization
    except ImportError as error:
        raise UserError(
            "the tool retrieval needs the package bm25s", "Run: pip install 'retrain[search]'"
        ) from error
    logging.getLogger("bm25s").setLevel(logging.NOTSET)  # it asks for everything
    return bm25s
