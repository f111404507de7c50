"""Rows to tokens and masks, on several cores where there is enough to do; what comes out is in order and the same."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from job.child import leave_with
from job.data.chat import ChatTemplate, Rendered, render
from job.data.encode import Encoded, Encoder
from job.data.formats import Shape, example_of, is_set_aside, key_of
from job.data.row_error import RowError
from job.data.rows import BadRow, Row
from job.errors import InternalError, JobError, TemporaryFailure
from job.process import Identity, this_process

log = logging.getLogger(__name__)

_BATCH_ROWS = 200
_BATCH_CHARACTERS = 1_000_000
"""Bounds of what one call makes."""
_CHARACTERS_OF_A_VALUE = 32
"""What a number, an object or a list takes of that bound by itself."""
_MOST_PROCESSES = 4
"""Each takes some 150 MiB."""
_WORTH_BYTES = 16 * 2**20
"""Below this the processes would take longer to start than they save."""


@dataclass(frozen=True)
class Made:
    """One row as tokens, and what the report says of it."""

    file: int
    """Which of the files it came from, from 0."""
    source: str
    number: int
    key: bytes
    """See ``job.data.formats.key_of``."""
    is_aside: bool
    """Whether it is evaluated on instead of trained on."""
    encoded: Encoded
    ending: str
    way: str
    begins_with_prompt: bool

    @property
    def origin(self) -> str:
        """For messages: ``train.jsonl:17``."""
        return f"{self.source}:{self.number}"


@dataclass(frozen=True)
class Batch:
    """Rows of one file."""

    file: int
    """Which of the files, from 0."""
    shape: Shape | None
    """How its rows are read; None as long as all of them are bad."""
    items: Sequence[Row | BadRow]


_Rendered = tuple[Row, bytes, bool, Rendered]
"""A row, its key, whether it is set aside, and its text."""


class RowMaker:
    """Makes rows. Processes get it whole, when they are forked."""

    def __init__(self, template: ChatTemplate | None, encoder: Encoder, share: float) -> None:
        """
        Args:
            share: ``data.eval_split``.
        """
        self._template, self._encoder, self._share = template, encoder, share

    def make(self, batch: Batch) -> list[Made | BadRow]:
        """Each row made, or what is wrong with it, in order."""
        read = [self._rendered(item, batch.shape) for item in batch.items]
        good = [one for one in read if not isinstance(one, BadRow)]
        encoded = iter(self._encoder.encode([(rendered, is_aside) for _, _, is_aside, rendered in good]))
        return [one if isinstance(one, BadRow) else _made(batch.file, one, next(encoded)) for one in read]

    def _rendered(self, row: Row | BadRow, shape: Shape | None) -> _Rendered | BadRow:
        if isinstance(row, BadRow):
            return row
        if shape is None:
            raise InternalError(f"{row.origin}: a row of a file that was not recognised")
        try:
            example = example_of(row.values, shape, self._template is not None)
            key = key_of(example)
            return row, key, is_set_aside(key, self._share), render(example, self._template)
        except RowError as problem:
            return BadRow(row.source, row.number, problem.kind, str(problem))


def _made(file: int, one: _Rendered, encoded: Encoded) -> Made:
    row, key, is_aside, rendered = one
    begins = rendered.text.startswith(rendered.prompt)
    return Made(file, row.source, row.number, key, is_aside, encoded, rendered.ending, rendered.way, begins)


def batches(file: int, items: Iterable[Row | BadRow], shape_of: Callable[[Row], Shape | BadRow]) -> Iterator[Batch]:
    """The items of one file in batches; what was read before a failure comes before it.

    Args:
        shape_of: how the file's rows are read; asked with every row until it knows.
    """
    shape: Shape | None = None
    waiting: list[Row | BadRow] = []
    characters = 0
    try:
        for item in items:
            if isinstance(item, Row):
                found = shape or shape_of(item)
                if isinstance(found, Shape):
                    shape = found
                    characters += _characters(item.values)
                else:
                    item = found
            waiting.append(item)
            if len(waiting) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                yield Batch(file, shape, waiting)
                waiting, characters = [], 0
    except JobError:
        yield Batch(file, shape, waiting)
        raise
    yield Batch(file, shape, waiting)


def _characters(values: Any) -> int:
    """Characters of all texts in a row, however deep they stand; anything else counts as a few."""
    count, waiting = 0, [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            count += len(value)
            continue
        count += _CHARACTERS_OF_A_VALUE
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return count


def processes_for(files: Sequence[Path]) -> int:
    """How many processes files of this size are worth, as far as this container's share of the machine goes."""
    if sum(path.stat().st_size for path in files if path.exists()) < _WORTH_BYTES:
        return 1
    return max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)), _cpu_limit()))


def _cpu_limit() -> int:
    """The container's limit in whole cores, by its cgroup; many where there is none."""
    quota = ["max", "1"]
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        if Path(path).exists():
            quota = [*Path(path).read_text(encoding="ascii").split(), "100000"]
            break
    return int(quota[0]) // int(quota[1]) if quota[0].isdigit() else 1000


def in_order(maker: RowMaker, work: Iterator[Batch], processes: int) -> Generator[Made | BadRow, None, None]:
    """Everything in ``work``, made, in order; never more than a few batches are held.

    Raises:
        TemporaryFailure: a process vanished.
        JobError: as ``work`` raises, once what came before was given out.
    """
    pool = _pool(maker, processes) if processes > 1 else None
    if pool is None:
        for batch in work:
            yield from maker.make(batch)
        return
    try:
        yield from _through(pool, work, 2 * processes)
    except BrokenProcessPool as error:
        raise TemporaryFailure("prepare: a process was ended from outside; too little memory, most often") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(maker: RowMaker, processes: int) -> ProcessPoolExecutor | None:
    """The processes; None where the system has no semaphores to share (no /dev/shm)."""
    try:
        return ProcessPoolExecutor(processes, get_context("fork"), _begin, (maker, this_process()))
    except (OSError, NotImplementedError) as error:
        log.info("rows are made by one process: %s", error)
        return None


def _through(pool: ProcessPoolExecutor, work: Iterator[Batch], ahead: int) -> Iterator[Made | BadRow]:
    pending: deque[Future[list[Made | BadRow]]] = deque()
    failure: JobError | None = None
    try:
        for batch in work:
            pending.append(pool.submit(_make, batch))
            if len(pending) > ahead:
                yield from pending.popleft().result()
    except JobError as error:
        failure = error
    while pending:
        yield from pending.popleft().result()
    if failure is not None:
        raise failure


_maker: RowMaker | None = None


def _begin(maker: RowMaker, parent: Identity) -> None:
    global _maker
    _maker = maker
    # A process whose parent was killed would wait for work for ever.
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()


def _make(batch: Batch) -> list[Made | BadRow]:
    if _maker is None:
        raise InternalError("a process that makes rows was not begun")
    return _maker.make(batch)
