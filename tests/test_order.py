"""The order of tests. Reference: what a list in another order must keep, and counts in its parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.order import spread

FILES = st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=30)


def ordered(files: list[tuple[int, bool]]) -> list[tuple[int, int]]:
    """Return the order of files of so many tests, of which some wait; a test is (file, number)."""
    tests = [(file, number) for file, (count, _) in enumerate(files) for number in range(count)]
    return spread(tests, file=lambda test: test[0], waits=lambda test: files[test[0]][1] and test[1] == 0)


@given(FILES)
def test_each_test_is_there_once_and_files_are_whole(files: list[tuple[int, bool]]) -> None:
    order = ordered(files)
    firsts = [file for file, number in order if number == 0]
    assert order == [(file, number) for file in firsts for number in range(files[file][0])]
    for kind in (False, True):
        assert [file for file in firsts if files[file][1] == kind] == [
            file for file, (_, waits) in enumerate(files) if waits == kind
        ]
    assert sorted(firsts) == list(range(len(files)))


def test_those_that_wait_are_in_each_part() -> None:
    """Twenty files that wait come first by name, eighty that compute after them."""
    order = ordered([(5, True)] * 20 + [(5, False)] * 80)
    for part in range(5):
        waiting = {file for file, _ in order[part * 100 : part * 100 + 100] if file < 20}
        assert len(waiting) in (2, 3, 4, 5)
    assert all(file >= 20 for file, _ in order[-25:])
