"""What a fuzz test is here: a planned number of cases, each of which works or ends in one line, within seconds.

Cases are drawn from a fixed seed, so that every run of the suite tries the same ones.
"""

import contextlib
import copy
import functools
import hashlib
import io
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepp.cli import main
from moepp.model import InputError

SECONDS = 60  # more than this for one case is a hang

PLANNED: dict[str, int] = {}  # test → its number of cases


# ---- damage ------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
POSITION = st.floats(0, 1, exclude_max=True)  # in a file or a tree whose size the strategy does not know


@dataclass(frozen=True)
class Edit:
    """One thing done to the bytes of a file."""

    kind: str
    at: float
    by: bytes

    def __call__(self, data: bytes) -> bytes:
        i = int(self.at * len(data))
        flipped = bytes(old ^ (new or 1) for old, new in zip(data[i:], self.by, strict=False))
        return {
            "cut": data[:i],
            "insert": data[:i] + self.by + data[i:],
            "remove": data[:i] + data[i + len(self.by) :],
            "flip": data[:i] + flipped + data[i + len(self.by) :],
            "replace": self.by,
        }[self.kind]


EDIT = st.builds(
    Edit,
    st.sampled_from(["cut", "insert", "remove", "flip", "flip", "replace"]),
    POSITION,
    st.binary(min_size=1, max_size=9),
)


@dataclass(frozen=True)
class TreeEdit:
    """One thing done to a tree of mappings and lists: an entry dropped, renamed, or with another value."""

    kind: str
    at: float
    value: Any

    def __call__(self, tree: Any) -> Any:
        tree = copy.deepcopy(tree)
        places = list(entries(tree))
        where, key = places[int(self.at * len(places))]
        if self.kind == "set" or isinstance(where, list):
            where[key] = self.value
        elif self.kind == "drop":
            del where[key]
        else:
            where[str(self.value)] = where.pop(key)
        return tree


def tree_edit(values: st.SearchStrategy[Any] = JUNK) -> st.SearchStrategy[TreeEdit]:
    return st.builds(TreeEdit, st.sampled_from(["set", "set", "set", "drop", "rename"]), POSITION, values)


def entries(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(mapping or list, key or index) of everything in a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    for key in keys:
        yield tree, key
        yield from entries(tree[key])


# ---- cases -------------------------------------------------------------------------------------------------


def cases(
    number: int, least_good: float = 0.0, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable], Callable]:
    """Run a test on `number` drawn cases, each within `SECONDS`, and see that it were so many, and that for
    `least_good` of them it returned True. Of a profile of hypothesis (conftest.py) that is for a part of them, on
    that part."""

    def decorate(test: Callable) -> Callable:
        PLANNED[f"{test.__module__}.{test.__name__}"] = number
        tried = -(-number * settings.default.max_examples // 100)
        done = good = 0

        @functools.wraps(test)
        def one_case(*args: Any, **drawn: Any) -> None:
            nonlocal done, good
            done += 1
            with time_limit(SECONDS):
                good += test(*args, **drawn) is True

        bulk = settings(
            max_examples=tried,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(one_case))

        @functools.wraps(bulk)
        def counted(*args: Any, **fixtures: Any) -> None:
            nonlocal done, good
            done = good = 0
            bulk(*args, **fixtures)
            assert done >= tried, f"only {done} cases: give the strategies more to draw from"
            assert good >= least_good * done, f"of {done} cases only {good} got as far as they should"

        return counted

    return decorate


class Hang(BaseException):
    """A case took too long; no `except Exception` on its way may swallow that."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Counted in ticks, of which a pause brings only one: a process that was stopped for a while does not hang."""
    left = 20

    def tick(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, seconds / left, seconds / left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def works_or_one_line(*arguments: str) -> bool:
    """Runs a verb in the current directory. True where it worked; where not, it said why in one line, changed no
    file and left no run behind."""
    before = digests()
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), shown_warnings(errors):
        try:
            code = main(arguments)
        except SystemExit as end:  # --print_config and --help
            code = end.code
    after = digests()
    assert {name: after.get(name) for name in before} == before, "a file was changed"
    if code == 0:
        return True
    lines = errors.getvalue().splitlines()
    assert (code, len(lines)) == (2, 1), (code, errors.getvalue())
    assert lines[0].startswith(f"moepp {arguments[0]}: ")
    assert not [name for name in after.keys() - before.keys() if name.startswith("runs/")], "a run was left behind"
    return False


def refused(call: Callable[[], Any]) -> bool:
    """Calls it; whether it ended in an InputError. Any other exception is a failure of the test."""
    try:
        call()
    except InputError:
        return True
    return False


def digests() -> dict[str, str]:
    """Every file below the current directory."""
    files = (path for path in Path().rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def shown_warnings(stream: io.StringIO) -> Iterator[None]:
    """A warning is a line more for the user; pytest would keep it to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", quiet)  # as Python does
        warnings.showwarning = lambda *warning, **_: print(warnings.formatwarning(*warning[:4]), file=stream)
        yield
