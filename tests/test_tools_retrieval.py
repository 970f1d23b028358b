"""The retrieval tool: what it finds, what it shows, and its index on disk."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrain.tools import ToolRunner, resolve_tools
from retrain.tools import passages as module
from retrain.tools.base import ModelError
from retrain.tools.passages import (
    Columns,
    Passage,
    PassageIndex,
    highest,
    open_index,
    read_passages,
    singular,
)
from retrain.tools.retrieval import INLINE_PASSAGES, NOTHING, RetrievalTool, cut, show_passages
from retrain.types import ToolCall, UserError

ROWS = [
    {"id": 7, "title": "Oslo", "text": "Oslo is the capital of Norway."},
    {"id": 8, "title": "Bergen", "text": "Bergen is a town\nin Norway, by the sea."},
    {"id": 9, "title": "Rome", "text": "Rome is the capital of Italy."},
    {"id": 10, "title": None, "text": "..."},
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", ROWS)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def make(corpus: Any, tmp_path: Path, **params: Any) -> RetrievalTool:
    return RetrievalTool(corpus, index_dir=tmp_path / "indexes", **params)


async def ask(tool: RetrievalTool, query: str) -> str:
    return await tool.session().call({"query": query})


async def test_the_passages_that_fit_best_come_first_with_id_and_title(
    corpus: Path, tmp_path: Path
) -> None:
    tool = make(corpus, tmp_path, title_column="title", id_column="id", top_k=2)
    assert await ask(tool, "Norway's sea?") == (
        "Doc 1 (Id: 8, Title: Bergen) Bergen is a town in Norway, by the sea.\n"
        "Doc 2 (Id: 7, Title: Oslo) Oslo is the capital of Norway."
    )
    assert await ask(tool, "paris") == NOTHING


async def test_a_title_is_searched_only_where_it_is_named(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"title": "Oslo", "text": "A capital."}, {"text": "x"}])
    assert await ask(make(corpus, tmp_path), "oslo") == NOTHING
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: there is no column 'title'"):
        make(corpus, tmp_path, title_column="title")


def test_scores_are_bm25(tmp_path: Path) -> None:
    """One word, k1 1.5 and b 0.75: idf ln(1 + (N - n + .5) / (n + .5)) times the term weight."""
    texts = ["red", "red red blue", "blue green grey pink"]
    corpus = write(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    index = make(corpus, tmp_path).index
    (word,) = index._scorer.get_tokens_ids(["red"])
    scores = index._scorer.get_scores_from_ids([word])
    idf, average = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5)), 8 / 3

    def weight(count: int, length: int) -> float:
        return count / (count + 1.5 * (0.25 + 0.75 * length / average))

    assert scores == pytest.approx([idf * weight(1, 1), idf * weight(2, 3), 0.0], rel=1e-6)
    assert [p.text for p in index.search(["red"], 3)] == ["red", "red red blue"]


async def test_equal_scores_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    rows = [{"text": f"word{n % 7} same"} for n in range(100)]
    tool = make(write(tmp_path / "c.jsonl", rows), tmp_path, top_k=20)
    found = [p.text for p in tool.index.search(["same"], 20)]
    assert found == [row["text"] for row in rows[:20]]


def test_the_highest_scores_above_zero_with_ties_by_index() -> None:
    scores = np.array([1, 0, 3, 1, 3, 0, 1], dtype=np.float32)
    assert highest(scores, 1) == [2]
    assert highest(scores, 4) == [2, 4, 0, 3]
    assert highest(scores, 6) == [2, 4, 0, 3, 6]
    assert highest(scores, 99) == [2, 4, 0, 3, 6]


@pytest.mark.parametrize(
    ("word", "expected"),
    [("cities", "city"), ("towns", "town"), ("houses", "house"), ("glass", "glass"),
     ("bus", "bus"), ("shoes", "shoes"), ("aies", "aies"), ("sea", "sea")],
)  # fmt: skip
def test_english_plurals_count_as_singulars(word: str, expected: str) -> None:
    assert singular(word) == expected


async def test_the_language_decides_stop_words_and_plurals(corpus: Path, tmp_path: Path) -> None:
    english, plain = make(corpus, tmp_path), make(corpus, tmp_path, language=None)
    assert "Bergen" in await ask(english, "towns")
    assert await ask(plain, "towns") == NOTHING
    assert "Oslo" in await ask(plain, "the")
    with pytest.raises(ModelError, match="no word to search for"):
        await ask(english, "the of?")
    with pytest.raises(UserError, match="'klingon'"):
        make(corpus, tmp_path, language="klingon")


async def test_an_empty_query_is_the_models_fault(corpus: Path, tmp_path: Path) -> None:
    runner = ToolRunner([make(corpus, tmp_path)])
    results = await runner.run(
        [ToolCall("search", {"query": " "}), ToolCall("search", {}), ToolCall("search", {"q": "x"})]
    )
    assert [r.status for r in results] == ["model_error"] * 3
    assert results[0].text == "The query is empty."


async def test_a_lone_surrogate_or_many_words_do_no_harm(corpus: Path, tmp_path: Path) -> None:
    tool = make(corpus, tmp_path)
    assert await ask(tool, "\ud800 oslo " + "norway " * 20_000) == await ask(tool, "oslo norway")


def test_a_passage_is_cut_after_a_word() -> None:
    assert cut("one  two\nthree", 13) == "one two three"
    assert cut("one two three", 12) == "one two …"
    assert cut("one two three", 7) == "one two …"
    assert cut("abcdef", 3) == "abc …"
    assert (
        show_passages([Passage("a b c"), Passage("d", id="4")], 3) == "Doc 1 a b …\nDoc 2 (Id: 4) d"
    )


def test_a_config_names_it(corpus: Path, tmp_path: Path) -> None:
    params = {"corpus": [str(corpus), str(corpus)], "index_dir": str(tmp_path), "name": "look"}
    (tool,) = resolve_tools("retrieval", params)
    assert tool.name == "look"
    assert tool.description.startswith("Search 8 passages")
    assert tool.parameters["required"] == ["query"]


def test_one_index_in_a_process(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = make(corpus, tmp_path, top_k=1)
    monkeypatch.chdir(tmp_path)
    assert make("corpus.jsonl", tmp_path, top_k=2).index is first.index
    assert make(corpus, tmp_path, language=None).index is not first.index
    assert first.session() is first.session()


def fresh_process_search(corpus: Path, tmp_path: Path, queries: list[str]) -> list[str]:
    """In this process, but with nothing held in memory of earlier openings."""
    module._opened.clear()
    tool = make(corpus, tmp_path, title_column="title", top_k=4)
    return [asyncio.run(ask(tool, query)) for query in queries]


def index_files(tmp_path: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in sorted((tmp_path / "indexes").rglob("*"))
        if path.is_file()
    }


def test_a_cached_index_and_a_fresh_one_give_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    queries = ["capital of Norway", "sea town", "Rome Oslo Bergen"]
    fresh = fresh_process_search(corpus, tmp_path, queries)
    files = index_files(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "indexes").rglob("*")}
    assert fresh_process_search(corpus, tmp_path, queries) == fresh
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "indexes").rglob("*")} == stamps
    other = tmp_path / "other"
    other.mkdir()
    assert fresh_process_search(corpus, other, queries) == fresh
    assert index_files(other) == files


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "garbage manifest"])
def test_a_half_written_index_is_built_again(damage: str, corpus: Path, tmp_path: Path) -> None:
    fresh = fresh_process_search(corpus, tmp_path, ["Norway"])
    files = index_files(tmp_path)
    (place,) = (tmp_path / "indexes").iterdir()
    if damage == "truncated":
        os.truncate(place / "passages.jsonl", 10)
    elif damage == "missing":
        (place / "offsets.npy").unlink()
    elif damage == "no manifest":
        (place / "manifest.json").unlink()
    else:
        (place / "manifest.json").write_text('{"a')
    assert fresh_process_search(corpus, tmp_path, ["Norway"]) == fresh
    assert index_files(tmp_path) == files


async def test_a_changed_corpus_has_another_index(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path)
    write(corpus, [{"text": "Tolun lies in Norway."}])
    assert await ask(make(corpus, tmp_path), "norway") == "Doc 1 Tolun lies in Norway."
    assert len(list((tmp_path / "indexes").iterdir())) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", [{"text": "a b"}, {"text": 3}])
    with pytest.raises(UserError, match="line 2"):
        make(corpus, tmp_path)
    assert list((tmp_path / "indexes").iterdir()) == []


def test_a_corpus_that_changes_meanwhile_is_not_indexed(
    corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole = module._write

    def write_and_change(*args: Any) -> None:
        whole(*args)
        write(corpus, [{"text": "changed"}])

    monkeypatch.setattr(module, "_write", write_and_change)
    with pytest.raises(UserError, match="changed while it was being indexed"):
        make(corpus, tmp_path)
    assert list((tmp_path / "indexes").iterdir()) == []


BUILD = """
import asyncio, sys
from retrain.tools.retrieval import RetrievalTool
tool = RetrievalTool(sys.argv[1], index_dir=sys.argv[2])
print(asyncio.run(tool.session().call({"query": "word3 word5"})))
"""


def test_processes_that_build_at_once_agree(tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"word{n * k % 11}" for k in range(9))} for n in range(3000)]
    corpus = write(tmp_path / "c.jsonl", rows)
    command = [sys.executable, "-c", BUILD, str(corpus), str(tmp_path / "indexes")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert answers[0].startswith("Doc 1 ")
    assert len(set(answers)) == 1
    assert len(list((tmp_path / "indexes").iterdir())) == 1


def test_a_corpus_that_can_only_be_read_is_indexed_in_the_users_cache(
    corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(os.listdir(tmp_path))
    RetrievalTool(corpus)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "cache"])
    assert len(os.listdir(tmp_path / "cache" / "retrain" / "indexes")) == 1


def test_an_index_that_cannot_be_written_names_index_dir(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "indexes").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write an index to .*indexes") as caught:
        make(corpus, tmp_path)
    assert "index_dir" in caught.value.next_step
    with pytest.raises(UserError, match=r"cannot write an index to .*indexes"):
        make("retrain.recipes.search.world:passages", tmp_path)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"text": "x"', "line 3: malformed JSON"),
        (b'{"text": "\xff"}', "line 3: malformed JSON"),
        (b'["x"]', "line 3: expected an object, found list"),
        (b'{"txt": "x"}', "line 3: there is no column 'text'"),
        (b'{"text": null}', "line 3: column 'text' must hold text, found NoneType"),
        (b"[" * 100_000, "line 3: malformed JSON"),
    ],
)
def test_a_bad_line_is_named(line: bytes, cause: str, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        make(corpus, tmp_path)
    assert f"{corpus}, {cause}" in caught.value.cause


def test_other_mistakes_are_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        make(tmp_path / "none.jsonl", tmp_path)
    with pytest.raises(UserError, match="lists no file"):
        make([], tmp_path)
    with pytest.raises(UserError, match="top_k is 0"):
        make(corpus, tmp_path, top_k=0)
    with pytest.raises(UserError, match="no passage has a word"):
        make(write(tmp_path / "dots.jsonl", [{"text": "..."}]), tmp_path)
    with pytest.raises(UserError, match="did you mean 'top_k'"):
        resolve_tools("retrieval", {"corpus": str(corpus), "topk": 3})


ROWS_OF_A_FUNCTION = """
def rows(town="Oslo"):
    yield {"text": f"{town} is the capital."}

def numbers():
    return [1, {2}]
"""


async def test_a_corpus_may_be_made_by_a_function(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(ROWS_OF_A_FUNCTION)
    function = f"{tmp_path}/made.py:rows"
    first = make(function, tmp_path)
    assert await ask(first, "capital") == "Doc 1 Oslo is the capital."
    assert make(function, tmp_path).index is first.index
    other = make(function, tmp_path, corpus_params={"town": "Rome"})
    assert await ask(other, "capital") == "Doc 1 Rome is the capital."
    with pytest.raises(UserError, match="unexpected keyword argument 'city'"):
        make(function, tmp_path, corpus_params={"city": "Rome"})
    with pytest.raises(UserError, match=r"made\.py:numbers.*not JSON serializable"):
        make(f"{tmp_path}/made.py:numbers", tmp_path)
    with pytest.raises(UserError, match="corpus_params needs corpus to be an import path"):
        make(write(tmp_path / "c.jsonl", ROWS), tmp_path, corpus_params={"town": "Rome"})


def test_a_surrogate_in_the_corpus_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a \\ud800 b"}')
    (passage,) = read_passages([tmp_path / "c.jsonl"], Columns("text", None, None))
    assert passage.text == "a ? b"


async def test_a_large_corpus_is_searched_off_the_event_loop(
    corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import threading

    tool = make(corpus, tmp_path)
    searched_in: list[bool] = []
    search = PassageIndex.search

    def spy(self: PassageIndex, words: list[str], top_k: int) -> list[Passage]:
        searched_in.append(threading.current_thread() is threading.main_thread())
        return search(self, words, top_k)

    monkeypatch.setattr(PassageIndex, "search", spy)
    inline = await ask(tool, "norway")
    monkeypatch.setattr(PassageIndex, "__len__", lambda self: INLINE_PASSAGES + 1)
    assert await ask(tool, "norway") == inline
    assert searched_in == [True, False]


def test_the_arrays_are_memory_mapped(corpus: Path, tmp_path: Path) -> None:
    index = open_index([corpus], Columns("text", None, None), language=None, directory=tmp_path)
    arrays = [*index._scorer.scores.values(), index._texts, index._offsets]
    assert sum(isinstance(array, np.memmap) for array in arrays) == 5
