"""How a child process of the supervisor ended, by file: ``accelerate launch`` turns every failure into exit 1."""

import errno
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from job.errors import DiskFailure, JobError, error_for
from job.exits import ExitCode
from job.files import read_json, write_json

log = logging.getLogger(__name__)

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


def as_foreseen(error: BaseException) -> JobError | None:
    """The failure of ours that an exception stands for; None if nobody foresaw it."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return DiskFailure(f"disk: {os.strerror(error.errno or 0)}{where}; free some space or name another folder")
    return None


def record(path: Path, body: Callable[[], ExitCode], classify: Callable[[BaseException], JobError | None]) -> int:
    """Runs a child's body and writes down how it ended, whatever that is.

    Returns:
        The process's exit code, which is also in the file.
    """
    try:
        code, message = body(), ""
    except Exception as error:
        foreseen = as_foreseen(error) or classify(error)
        if foreseen is None:
            log.exception("a failure nobody foresaw; please report it")
            code, message = ExitCode.CRASH, f"{type(error).__name__}: {error}"
        else:
            log.debug("%s", foreseen, exc_info=True)
            code, message = foreseen.exit_code, str(foreseen)
    write_json(path, {"exit_code": int(code), "message": message})
    return int(code)


def recorded(path: Path) -> ExitCode | JobError | None:
    """What a child wrote down: the code it ended well with (0, or 143 on request), the failure, or nothing."""
    try:
        outcome = read_json(path)
    except FileNotFoundError:
        return None
    if outcome["exit_code"] in (ExitCode.OK, ExitCode.INTERRUPTED):
        return ExitCode(outcome["exit_code"])
    return error_for(outcome["exit_code"], outcome["message"])


def cause(outcomes: Iterable[ExitCode | JobError | None]) -> JobError | None:
    """The failure that explains those of a group: a real cause before a rank that only lost its peers."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, JobError)]
    return min(failures, key=lambda failure: failure.exit_code == ExitCode.TEMPFAIL, default=None)
