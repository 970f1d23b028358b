"""Who builds an index, what has its name, and what is left in its directory."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from retrain.tools import index_dir
from retrain.tools import passages as module
from retrain.tools.passages import Columns, open_index
from retrain.tools.retrieval import RetrievalTool
from retrain.types import UserError
from test_tools_retrieval import ROWS, make, write


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", ROWS)


def places(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "indexes").iterdir())


def changing(corpus: Path, monkeypatch: pytest.MonkeyPatch, before: Any = None) -> None:
    """The corpus changes while the next index of it is built."""
    whole = module._write

    def write_and_change(*args: Any) -> None:
        whole(*args)
        if before is not None:
            before()
        write(corpus, [{"text": "changed"}])

    monkeypatch.setattr(module, "_write", write_and_change)


def test_an_index_of_other_content_never_gets_the_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for a moment, in which the process might be killed."""
    moved: list[Path] = []
    monkeypatch.setattr(module, "_move", lambda aside, place: moved.append(place))
    changing(corpus, monkeypatch)
    with pytest.raises(UserError, match="changed while it was being indexed"):
        make(corpus, tmp_path)
    assert moved == []


def test_the_good_index_of_another_process_stays(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that could not be locked out, say on another machine."""
    make(corpus, tmp_path)
    (place,) = places(tmp_path)
    theirs = place.rename(tmp_path / "theirs")
    module._opened.clear()
    changing(corpus, monkeypatch, before=lambda: theirs.rename(place))
    with pytest.raises(UserError, match="changed while it was being indexed"):
        make(corpus, tmp_path)
    assert places(tmp_path) == [place]
    assert module._is_whole(place)


def test_who_finds_another_building_waits_and_takes_its_index(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    make(corpus, tmp_path)
    (place,) = places(tmp_path)
    good = shutil.copytree(place, tmp_path / "good")
    (place / "offsets.npy").unlink()
    module._opened.clear()
    built: list[object] = []
    monkeypatch.setattr(module, "_write", lambda *args: built.append(args))
    found: list[RetrievalTool] = []
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.append(make(corpus, tmp_path)), daemon=True)
        other.start()
        other.join(0.3)
        assert other.is_alive() and not built, "it would replace what we are building"
        shutil.rmtree(place)
        good.rename(place)
    other.join(30)
    assert len(found[0].index) == len(ROWS) and not built
    assert places(tmp_path) == [place], "the lock is gone"


def test_a_whole_index_is_opened_without_a_lock(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lie where nothing can be written."""
    make(corpus, tmp_path)
    module._opened.clear()
    monkeypatch.setattr(index_dir, "_hold", lambda lock: pytest.fail("asked for a lock"))
    assert len(make(corpus, tmp_path).index) == len(ROWS)


def test_a_corpus_that_cannot_be_read_is_not_blamed_on_the_index(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module._write

    def vanish(*args: Any) -> None:
        corpus.unlink()
        whole(*args)

    monkeypatch.setattr(module, "_write", vanish)
    with pytest.raises(UserError, match=r"cannot read .*corpus\.jsonl: No such file"):
        make(corpus, tmp_path)


FUNCTIONS = """
from pathlib import Path
from retrain.tools.retrieval import RetrievalTool

def lost():
    yield from open("/nowhere/data.jsonl")

def wrong():
    yield {"text": int("x")}

def typed():
    yield {"text": 1 + "x"}

def nothing():
    return None

def circle():
    row = {}
    row["text"] = row
    return [{"text": "a"}, row]

def nested(directory):
    inner = Path(directory, "inner.jsonl")
    inner.write_text('{"text": "alpha"}')
    tool = RetrievalTool(inner, index_dir=directory)
    yield {"text": tool.index[0].text + " beta"}
"""


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("lost", "raised FileNotFoundError: .*/nowhere/data.jsonl"),
        ("wrong", "raised ValueError: invalid literal"),
        ("typed", "raised TypeError: unsupported operand"),
        ("nothing", "returned NoneType, not rows"),
        ("circle", "row 2: Circular reference"),
    ],
)
def test_what_a_corpus_function_raises_is_its_own(name: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(FUNCTIONS)
    with pytest.raises(UserError, match=rf"corpus '.*made\.py:{name}',?:? ?{cause}") as caught:
        make(f"{tmp_path}/made.py:{name}", tmp_path)
    assert "index_dir" not in caught.value.next_step
    assert "corpus_params" not in caught.value.next_step
    assert not (tmp_path / "indexes").exists() or places(tmp_path) == []


def test_a_corpus_function_may_open_an_index(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(FUNCTIONS)
    params = {"directory": str(tmp_path)}
    found: list[RetrievalTool] = []

    def act() -> None:
        found.append(make(f"{tmp_path}/made.py:nested", tmp_path, corpus_params=params))

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits for itself"
    assert found[0].index[0].text == "alpha beta"


def test_an_index_of_an_earlier_state_is_let_go(corpus: Path, tmp_path: Path) -> None:
    module._opened.clear()
    columns = Columns("text", None, None)

    def opened() -> module.PassageIndex:
        return open_index([corpus], columns, language=None, directory=tmp_path / "indexes")

    first = weakref.ref(opened())
    assert opened() is first()
    write(corpus, [{"text": "another"}])
    assert len(opened()) == 1
    gc.collect()
    assert first() is None
    assert len(module._opened) == 1


def test_what_a_killed_builder_left_goes_after_a_day(corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "indexes"
    directory.mkdir()
    a, b = "a" * 32, "b" * 32
    leftovers = [f".{a}.{b}", f".{a}.{b}.broken", f".{b}", f"{a}.lock"]
    foreign = [".ssh", f".{a}.txt", f"{a}.jsonl", f".{a[1:]}"]
    for name in (*leftovers, *foreign):
        if name in leftovers[:2] or name == ".ssh":
            (directory / name).mkdir()
            (directory / name / "file").write_text("x")
        else:
            (directory / name).write_text("x")
        old = time.time() - 25 * 3600
        os.utime(directory / name, (old, old))
    (directory / f".{b}.{a}").mkdir()
    make(corpus, tmp_path)
    left = {path.name for path in places(tmp_path)}
    assert left >= {*foreign, f".{b}.{a}"}, "what has another name, or is young, stays"
    assert not left & set(leftovers)
    assert len(left) == len(foreign) + 2
