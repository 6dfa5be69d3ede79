"""Page: the binding of native/page.c. What the page itself promises is tested in native/tests/test_page.c."""

from __future__ import annotations

import mmap

import pytest

from ascproxy._native import Page

SIZE = 1 << 16


def test_a_second_page_over_the_same_memory_sees_the_series_and_its_cells() -> None:
    memory = mmap.mmap(-1, SIZE)
    first = Page(memory).series(b"exchange\0chat", 4)
    Page(memory).add(first + 3, 5)
    Page(memory).add(first + 3, -2)
    assert Page(memory).records() == [(b"exchange\0chat", first, 4)]
    assert Page(memory).load(first + 3) == 3


def test_the_mapping_cannot_be_closed_under_a_page() -> None:
    memory = mmap.mmap(-1, SIZE)
    page = Page(memory)
    with pytest.raises(BufferError):
        memory.close()
    del page
    memory.close()


def test_a_read_only_page_is_read_and_never_written() -> None:
    memory = mmap.mmap(-1, SIZE)
    cell = Page(memory).series(b"k", 1)
    Page(memory).store(cell, 9)
    page = Page(bytes(memory))
    assert page.load(cell) == 9
    for write in (lambda: page.add(cell, 1), lambda: page.store(cell, 1), lambda: page.series(b"n", 1)):
        with pytest.raises(ValueError, match="read-only"):
            write()


@pytest.mark.parametrize("bad", [b"", bytes(SIZE), b"x" * SIZE, bytes(range(256)) * 8])
def test_bytes_that_are_no_page_are_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="not a metric page"):
        Page(bad)


def test_header_cells_have_names() -> None:
    assert Page.CELLS["magic"] == 0
    assert len(set(Page.CELLS.values())) == len(Page.CELLS)
    assert max(Page.CELLS.values()) < 64
