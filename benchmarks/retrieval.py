"""The retrieval tool over 100k passages: building, opening, searching, memory.

    python benchmarks/retrieval.py [--passages 100000] [--queries 500]

Passages of 60 to 140 words, drawn by Zipf's law from a vocabulary of 120k, and queries of 3 to 12
words drawn likewise, without stop words: common words make it harder than questions would. A
search is timed as the model meets it, from the arguments to the text that it reads, one at a time
in one thread. The yardstick is bm25s's own `retrieve` on the same words. Memory is that of
processes which each open the index and search. Exits with 1 when the bound below is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retrain.tools.retrieval import RetrievalTool

VOCABULARY = 120_000
P99_MS = 10.0
"""Bound: of one search."""


def synthesise(passages: int, queries: int, corpus: Path) -> list[str]:
    """Write a corpus; return queries."""
    generator = np.random.default_rng(0)
    words = np.array([f"w{n:x}q" for n in range(VOCABULARY)])
    shares = np.cumsum(1 / np.arange(1, VOCABULARY + 1) ** 1.05)
    shares /= shares[-1]

    def text(shortest: int, longest: int) -> str:
        count = generator.integers(shortest, longest + 1)
        return " ".join(words[np.searchsorted(shares, generator.random(count), side="right")])

    with corpus.open("w") as stream:
        for number in range(passages):
            title = f"w{number % VOCABULARY:x}q"
            stream.write(json.dumps({"title": title, "text": text(60, 140)}) + "\n")
    return [text(3, 12) for _ in range(queries)]


def open_tool(corpus: Path, directory: Path) -> RetrievalTool:
    return RetrievalTool(
        corpus, title_column="title", language=None, index_dir=directory / "indexes"
    )


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


async def search_ms(tool: RetrievalTool, queries: list[str]) -> np.ndarray:
    session, seconds = tool.session(), []
    for query in queries:
        started = time.perf_counter()
        await session.call({"query": query})
        seconds.append(time.perf_counter() - started)
    return np.array(seconds) * 1000


def library_ms(tool: RetrievalTool, queries: list[str]) -> np.ndarray:
    scorer = tool.index._scorer
    words = [[tool.index.words(query)] for query in queries]
    return 1000 * np.array(
        [timed(lambda w=w: scorer.retrieve(w, k=3, show_progress=False)) for w in words]
    )


def memory_mb(field: str) -> float:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def user(corpus: Path, directory: Path, queries: list[str], ready: object, out: object) -> None:
    """A process that opens the index and searches; its memory once all have done so."""
    before = memory_mb("Pss")
    started = time.perf_counter()
    tool = open_tool(corpus, directory)
    opened = time.perf_counter() - started
    asyncio.run(search_ms(tool, queries))
    ready.wait()
    out.put((opened, memory_mb("Rss"), memory_mb("Pss") - before))
    ready.wait()


def users(count: int, corpus: Path, directory: Path, queries: list[str]) -> list[tuple]:
    context = multiprocessing.get_context("spawn")
    ready, out = context.Barrier(count), context.Queue()
    arguments = (corpus, directory, queries, ready, out)
    processes = [context.Process(target=user, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    found = [out.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpus = directory / "corpus.jsonl"
        queries = synthesise(arguments.passages, arguments.queries, corpus)
        megabytes = corpus.stat().st_size / 1e6
        print(f"corpus: {arguments.passages:,} passages, {megabytes:.0f} MB")
        print(f"build: {timed(lambda: open_tool(corpus, directory)):.1f} s")
        tool = open_tool(corpus, directory)
        size = sum(f.stat().st_size for f in (directory / "indexes").rglob("*") if f.is_file())
        print(f"index: {size / 1e6:.0f} MB, {size / 1e6 / megabytes:.2f} of the corpus")
        own, library = asyncio.run(search_ms(tool, queries)), library_ms(tool, queries)
        for label, ms in (("a search", own), ("bm25s alone", library)):
            print(f"{label}: p50 {np.median(ms):.2f} ms, p99 {np.percentile(ms, 99):.2f} ms")
        ratio = np.percentile(library, 99) / np.percentile(own, 99)
        print(f"p99 of bm25s alone over ours: {ratio:.2f}")
        for count in (1, 4):
            found = users(count, corpus, directory, queries)
            opened, resident, share = np.median(np.array(found), axis=0)
            print(
                f"{count} processes: open {opened:.2f} s, resident {resident:.0f} MB, "
                f"own share of the index {share:.0f} MB each"
            )
        sys.exit(bool(np.percentile(own, 99) > P99_MS))


if __name__ == "__main__":
    main()
