"""``python -m job``: the entrypoint of the container, and of a run on this machine."""

import argparse
import logging
import os
import signal
from pathlib import Path

from job.errors import DiskFailure, JobError, SpecNotMounted
from job.exits import ExitCode

log = logging.getLogger("job")

SPEC = Path("/etc/tunejob/spec.yaml")
OUTPUT = "TUNEJOB_OUTPUT"
SCRATCH = "TUNEJOB_SCRATCH"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m job", description="Runs one attempt of one run.")
    parser.add_argument("verb", nargs="?", default="run", choices=["run"])
    parser.add_argument("--spec", type=Path, default=SPEC, help=f"the spec (default: {SPEC})")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", help=f"where runs go; the run's id is added (default: ${OUTPUT})")
    where.add_argument("--folder", help="exactly where this run goes")
    parser.add_argument("--outcome", type=Path, help="file for the exit code and its sentence (JSON)")
    parser.add_argument("--work", type=Path, help=f"scratch folder (default: below ${SCRATCH} or the user's cache)")
    return parser


def _work_folder() -> Path:
    """Where attempts have their scratch."""
    if os.environ.get(SCRATCH):
        return Path(os.environ[SCRATCH])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tunejob"


def _run(arguments: argparse.Namespace) -> ExitCode:
    from job.layout import fire_id
    from job.spec import read, run_id
    from job.supervision.account import JOB
    from job.supervision.supervisor import supervise

    if not os.path.exists(arguments.spec):  # also where the folder may not be looked into
        raise SpecNotMounted(
            f"no spec at {arguments.spec} that this user can see; mount the ConfigMap there, or name a file with --spec"
        )
    spec = read(arguments.spec)
    root: str = arguments.output or os.environ.get(OUTPUT, "")
    if not root and arguments.folder is None:
        raise SpecNotMounted(f"nowhere to put the run: set {OUTPUT}, or give --output URI")
    run = run_id(spec)
    kube_job = os.environ.get(JOB, "")
    if spec.scheduling.cron and kube_job:  # each fire is a run of its own
        run = fire_id(run, kube_job)
    uri = arguments.folder or f"{root.rstrip('/')}/{run}"
    return supervise(spec, uri, arguments.work or _work_folder(), arguments.outcome)


def _leave_at_once(*_: object) -> None:
    """Until the supervisor takes over there is nothing to save; as pid 1 a signal without a handler would be lost."""
    _say_why(ExitCode.INTERRUPTED, "asked to leave before anything began")
    os._exit(ExitCode.INTERRUPTED)


def _make_folders() -> None:
    """In a container the folders that libraries write to lie on the scratch volume, which comes empty.

    Raises:
        DiskFailure: it cannot be written.
    """
    scratch = os.environ.get(SCRATCH)
    if scratch:
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
            folder = Path(os.environ.get(name) or "/")
            if folder.is_relative_to(scratch):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise DiskFailure(
                        f"{SCRATCH}={scratch}: cannot be written ({error.strerror}); check the volume's "
                        "mount and its fsGroup"
                    ) from error


def _say_why(code: ExitCode, message: str) -> None:
    """The last word of an attempt that never began."""
    from job.status import Status
    from job.supervision.announce import leave_word

    leave_word(Status(run="", attempt=0, phase="preflight", exit_code=int(code), message=message), None, 0.0)


def main(argv: list[str] | None = None) -> int:
    """Runs; the code says how it ended (``job.exits``)."""
    from job.supervision.announce import setup_logging

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave_at_once)
    setup_logging()
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:
        if leaving.code:
            _say_why(ExitCode.CALLED_WRONGLY, "called wrongly; see the log")
        raise
    try:
        _make_folders()
        return _run(arguments)
    except JobError as error:
        log.error("%s", error)
        _say_why(error.exit_code, str(error))
        return error.exit_code
    except Exception as error:
        log.exception("a failure nobody foresaw; please report it")
        _say_why(ExitCode.CRASH, f"{type(error).__name__}: {error}")
        return ExitCode.CRASH


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # Not sys.exit: threads that still wait for a store that does not answer would hold us up.
    os._exit(code)
