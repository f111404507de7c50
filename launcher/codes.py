"""How the launcher leaves where a cluster is concerned, and the failures behind it.

A run on this machine, and what reads a store, leaves with the run's own codes (``job.exits``): 64 and above.
"""

from enum import IntEnum
from typing import ClassVar

from job.errors import JobError


class Code(IntEnum):
    """The launcher's exit codes."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    TIMED_OUT = 3
    CLUSTER = 4
    REFUSED = 5
    NO_RESULT = 6
    STUCK = 7
    JOB_FAILED = 8
    SWEEP = 9
    INVALID = 78
    DETACHED = 130


MEANINGS = {
    Code.OK: "complete, or done what was asked",
    Code.UNEXPECTED: "a failure nobody foresaw",
    Code.USAGE: "called wrongly",
    Code.TIMED_OUT: "timed out; the run goes on",
    Code.CLUSTER: "cluster unreachable, or it does not let this account do it",
    Code.REFUSED: "refused by what is there: another spec, another Job of the run, admission, quota, namespace",
    Code.NO_RESULT: "the Job is complete, but the manifest is missing or wrong",
    Code.STUCK: "stuck before the start: image, Secret, scheduling",
    Code.JOB_FAILED: "the Job failed, or was deleted meanwhile",
    Code.SWEEP: "a sweep ended, some of it failed",
    Code.INVALID: "spec or profile invalid",
    Code.DETACHED: "detached; the run goes on",
}


class LauncherError(JobError):
    """A failure of the launcher's that we foresaw. Its class decides how the command leaves."""

    # The container's codes and the launcher's are two tables; both are numbers for the shell.
    exit_code: ClassVar[Code] = Code.UNEXPECTED  # type: ignore[assignment]


class TimedOut(LauncherError):
    """What was waited for did not come in time; the run goes on."""

    exit_code = Code.TIMED_OUT


class ClusterUnreachable(LauncherError):
    """The API server does not answer, or does not know who is asking."""

    exit_code = Code.CLUSTER


class NotAllowed(LauncherError):
    """The account lacks a permission; the sentence names verb and resource."""

    exit_code = Code.CLUSTER


class Refused(LauncherError):
    """What is there stands against it."""

    exit_code = Code.REFUSED


class NotFound(LauncherError):
    """It is not there: a run, a namespace, a log."""

    exit_code = Code.REFUSED


class NoRun(NotFound):
    """No such run."""


class NoResult(LauncherError):
    """The Job is complete, but what it should have published is missing or not what it said."""

    exit_code = Code.NO_RESULT


class Stuck(LauncherError):
    """The run cannot start, and waiting will not help."""

    exit_code = Code.STUCK


class RunFailed(LauncherError):
    """The Job of the run failed."""

    exit_code = Code.JOB_FAILED


class Deleted(LauncherError):
    """The run was deleted while it was watched."""

    exit_code = Code.JOB_FAILED


class Detached(LauncherError):
    """The user stopped watching; the run goes on."""

    exit_code = Code.DETACHED
