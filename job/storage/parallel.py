"""A few calls at once, for moving bytes."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

THREADS = 4
TICK_SECONDS = 0.2


def nothing() -> None:
    """A tick that does nothing."""


def in_parallel(call: Callable[[A], B], items: Sequence[A], tick: Callable[[], None] = nothing) -> list[B]:
    """The results in order. The first failure is raised once the calls under way are done; no new one begins.

    Args:
        tick: called a few times a second meanwhile. What it raises ends the waiting at once: calls under way then go on
            unseen, and whoever raises has to leave the process.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="transfer")
    futures = [pool.submit(call, item) for item in items]
    pending = set(futures)
    try:
        while pending:
            done, pending = wait(pending, TICK_SECONDS, FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                break
            tick()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown(cancel_futures=True)
    failure = next((f.exception() for f in futures if not f.cancelled() and f.exception()), None)
    if failure is not None:
        raise failure
    return [future.result() for future in futures]
