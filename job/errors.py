"""The failures we foresaw. A class says whose problem it is, and so how the process exits."""

from typing import ClassVar

from job.exits import ExitCode


class JobError(Exception):
    """A failure we foresaw. Its class decides how the process exits."""

    exit_code: ClassVar[ExitCode] = ExitCode.CRASH


class SpecNotMounted(JobError):
    """No spec where the entrypoint looks for one."""

    exit_code = ExitCode.USAGE


class DataInvalid(JobError):
    """The data cannot be read or trains nothing. Trying again cannot help."""

    exit_code = ExitCode.DATA


class InputMissing(JobError):
    """An input named in the spec is not there. Trying again cannot help."""

    exit_code = ExitCode.NOINPUT


class InternalError(JobError):
    """An invariant of ours broke; please report it."""

    exit_code = ExitCode.INTERNAL


class Conflict(JobError):
    """What is already in the store belongs to something else."""

    exit_code = ExitCode.CONFLICT


class DiskFailure(JobError):
    """No space, or the disk failed."""

    exit_code = ExitCode.DISK


class TemporaryFailure(JobError):
    """Store, network or a rank failed beyond its budget; another attempt may succeed."""

    exit_code = ExitCode.TEMPFAIL


class RankLost(TemporaryFailure):
    """A process of the training vanished by itself, whatever else was asked of it meanwhile."""


class IntegrityFailure(JobError):
    """Bytes are not what their hash or size says."""

    exit_code = ExitCode.INTEGRITY


class AccessDenied(JobError):
    """Credentials are missing, refused or expired. Never to be read as "not found"."""

    exit_code = ExitCode.NOPERM


class SpecInvalid(JobError):
    """The spec, or something it chooses, cannot be run as written."""

    exit_code = ExitCode.CONFIG


class Fenced(JobError):
    """Another attempt owns the run."""

    exit_code = ExitCode.FENCED


class DeviceFailure(JobError):
    """The accelerator asked for is not there, or was lost."""

    exit_code = ExitCode.DEVICE


class DeviceOutOfMemory(JobError):
    """The device's memory did not suffice."""

    exit_code = ExitCode.OOM


class Hung(JobError):
    """No progress within the limit; the stacks are in the log."""

    exit_code = ExitCode.HANG


class Diverged(JobError):
    """Loss or gradient is NaN or infinite."""

    exit_code = ExitCode.DIVERGED


class NoProgress(JobError):
    """Attempt after attempt committed nothing new."""

    exit_code = ExitCode.NOPROGRESS


class ContainerMemory(JobError):
    """The container's memory limit was hit, and the kernel ended one of its processes."""

    exit_code = ExitCode.MEMORY


class BudgetSpent(JobError):
    """The hours the user allowed the run are used up."""

    exit_code = ExitCode.BUDGET


class Interrupted(JobError):
    """The supervisor was asked to leave; what could be committed is."""

    exit_code = ExitCode.INTERRUPTED


ERRORS: dict[ExitCode, type[JobError]] = {kind.exit_code: kind for kind in JobError.__subclasses__()}
"""From exit code to class, to raise again here what another process wrote down."""


def error_for(code: int, message: str) -> JobError:
    """The error another process recorded as ``code``; an unknown code is an unclassified failure."""
    try:
        return ERRORS[ExitCode(code)](message)
    except (KeyError, ValueError):
        return JobError(message)
