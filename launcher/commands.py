"""The commands that ask a cluster: what they print, and how they leave. The work is done in ``launcher.verbs``."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.codes import Code, Deleted, Detached, NoResult, Refused, RunFailed
from launcher.terminal import fit, named, say, show

if TYPE_CHECKING:
    from launcher.runs import Attempt, Run
    from launcher.submit import Submitted
    from launcher.verbs import Door


def render(arguments: argparse.Namespace) -> int:
    """Prints the manifests of a spec, or writes them to a folder."""
    from job.spec import read
    from launcher.render import to_yaml
    from launcher.verbs import bundle, rendered

    spec = read(Path(arguments.spec), arguments.set)
    if arguments.output is None:
        show(to_yaml(rendered(spec, arguments.profile).objects).rstrip("\n"))
        return Code.OK
    for path in bundle(Path(arguments.output), spec, arguments.profile, arguments.rerender):
        show(str(path))
    return Code.OK


def submit(arguments: argparse.Namespace) -> int:
    """Submits a spec; on a terminal it follows the run to its end."""
    from job.spec import read, run_id

    spec = read(Path(arguments.spec), arguments.set)
    door = _door(arguments)
    with _coming_back(_made(spec.name.rstrip("-") if spec.scheduling.cron else run_id(spec))):
        submitted = door.submit(spec, arguments.replace)
    return _submitted(arguments, door, submitted)


def retry(arguments: argparse.Namespace) -> int:
    """Makes a new Job where a failed one stands."""
    door = _door(arguments)
    with _coming_back(_made(arguments.run)):
        submitted = door.retry(arguments.run)
    return _submitted(arguments, door, submitted)


def _submitted(arguments: argparse.Namespace, door: "Door", submitted: "Submitted") -> int:
    run = submitted.run
    if not submitted.is_new:
        say(f"{run.id}: {run.state} as {run.kube_job['kind']} {run.job} ({door.cluster.place})")
    is_live = not (run.is_schedule or run.has_ended)
    is_watched = arguments.output == "table" and sys.stdout.isatty() and sys.stderr.isatty()
    if is_live and is_watched and not arguments.detach:
        return _followed(door, run)
    _print(arguments, {"run": run.id, "job": run.job, "state": run.state, "namespace": run.namespace}, run.id)
    if is_live:
        say(f"to follow it: {_again('logs', '-f', run.id)}")
    return Code.OK


def _made(name: str) -> str:
    """How to come back to what was being made when the user left."""
    return (
        f"interrupted; what was made goes on. {_again('status', name)} shows it, the same command again goes on from "
        f"here, {_again('cancel', name)} ends it"
    )


@contextmanager
def _coming_back(how: str) -> Iterator[None]:
    """Ctrl-C within the block ends this command alone, with a sentence how to come back."""
    try:
        yield
    except KeyboardInterrupt:
        raise Detached(how) from None


def _followed(door: "Door", run: "Run", tail: int | None = None, earlier: "tuple[Attempt, ...]" = ()) -> int:
    """Shows a run to its end, and what came of it."""
    from launcher.watch import follow

    back = f"detached; {run.id} goes on. To come back: {_again('logs', '-f', run.id)}. To end it: "
    with _coming_back(back + _again("cancel", run.id)):
        return _ended(
            door, run, partial(follow, door.cluster, run, say, _show, door.causes, tail=tail, earlier=earlier)
        )


def _show(line: Any) -> None:
    """One line of a log: progress as people read it, everything else as it is."""
    from launcher.show import progress_line
    from launcher.stream import progress

    word = progress(line.text)
    show(line.text if word is None else progress_line(word))


def _ended(door: "Door", run: "Run", watch: "Callable[[], Run]", tell: "Callable[[Run], None] | None" = None) -> int:
    """Says how a run ended; the code is that of ``launcher.watch.outcome``.

    Args:
        watch: gives the run when it has ended.
        tell: takes the ended run before anything is said of it.
    """
    from launcher.watch import outcome

    try:
        ended = watch()
    except Deleted:
        if not _has_manifest(door, run, if_unknown=False):
            raise
        say(f"{run.job} was deleted meanwhile, and {run.id} is published; {_again('results', run.id)} shows it")
        return Code.OK
    if tell:
        tell(ended)
    code = outcome(ended, lambda: _has_manifest(door, ended))
    if code == Code.JOB_FAILED:
        cause = next(iter(door.causes(ended)), None)
        said = f"{cause.sentence}\n{cause.remedy}" if cause else ended.message
        raise RunFailed(f"{ended.id} failed: {said}")
    if code == Code.NO_RESULT:
        raise NoResult(
            f"{ended.job} is complete, but there is no manifest below {ended.output}: was the folder deleted?"
        )
    say(f"{ended.id}: complete; {_again('results', ended.id)} shows what it left")
    return code


def _has_manifest(door: "Door", run: "Run", if_unknown: bool = True) -> bool:
    """Whether the store has the run's manifest; a store that cannot be asked from here is not the run's failure."""
    from job.errors import JobError
    from job.layout import MANIFEST

    try:
        return door.store(run).read(MANIFEST) is not None
    except JobError as error:
        say(f"no pod is left to say what was published, and the store cannot be asked: {error}")
        return if_unknown


def listed(arguments: argparse.Namespace) -> int:
    """Every run of the namespace."""
    from launcher.show import listed

    door = _door(arguments)
    runs = door.runs()
    _print(arguments, [listed(run) for run in runs])
    if not runs:
        say(f"no runs in namespace {door.cluster.namespace}")
    return Code.OK


def status(arguments: argparse.Namespace) -> int:
    """One run."""
    _print(arguments, _door(arguments).status(arguments.run))
    return Code.OK


def logs(arguments: argparse.Namespace) -> int:
    """The lines of a run's log; with -f until the run ends."""
    door = _door(arguments)
    if not arguments.follow:
        for line in door.logs(arguments.run, tail=arguments.tail):
            show(line.text)
        return Code.OK
    run = door.find(arguments.run)
    return _followed(door, run, arguments.tail, door.earlier(run))


def wait(arguments: argparse.Namespace) -> int:
    """Waits for the end of a run."""
    from launcher.show import status

    door = _door(arguments)
    run = door.find(arguments.run)

    def tell(ended: "Run") -> None:
        if arguments.output != "table":
            _print(arguments, status(ended, {}))
        if arguments.verify and ended.state == "complete":
            say(door.verified(ended))

    with _coming_back(f"no longer waiting; {run.id} goes on. To wait again: {_again('wait', run.id)}"):
        return _ended(door, run, partial(door.await_end, run, arguments.timeout, arguments.start_timeout), tell)


def why(arguments: argparse.Namespace) -> int:
    """Why a run is where it is."""
    causes = [replace(cause, remedy=named(cause.remedy)) for cause in _door(arguments).why(arguments.run)]
    _print(arguments, [cause.record() for cause in causes], "\n\n".join(cause.text() for cause in causes))
    return Code.OK


def results(arguments: argparse.Namespace) -> int:
    """What a finished run left, in the cluster's store or in a folder."""
    from launcher.summary import summary
    from launcher.verbs import results_of

    found = results_of(arguments.run, arguments.profile, say)
    if arguments.verify or arguments.download:
        say(found.verified())
    left = found.results
    if arguments.download:
        for path in found.download(Path(arguments.download), arguments.all):
            say(str(path))
        left = replace(left, uri=arguments.download)
    _print(arguments, dict(left.record), summary(left) if arguments.output == "table" else "")
    return Code.OK


def cancel(arguments: argparse.Namespace) -> int:
    """Ends a run; what it committed is kept."""
    run = _door(arguments).cancel(arguments.run)
    if run.is_schedule:
        say(f"{run.job}: the schedule is gone, and its fires' Jobs with it; what they committed is kept")
    else:
        kept = run.output or "its output"
        say(f"{run.id}: cancelled; what was committed is kept below {kept}, and submitting it again goes on from there")
    _print(arguments, {"run": run.id, "job": run.job, "state": "cancelled", "output": run.output}, "")
    return Code.OK


def delete(arguments: argparse.Namespace) -> int:
    """Takes a run off the cluster, after asking."""
    door = _door(arguments)
    what = door.doomed(arguments.run, arguments.data)
    if not arguments.yes and not _agreed(f"in namespace {door.cluster.namespace}, delete {what}?"):
        say("nothing was deleted")
        return Code.OK
    gone = door.take_away(what)
    for name in gone:
        say(f"deleted {name}")
    _print(arguments, {"run": what.run_id, "deleted": gone}, "")
    return Code.OK


def doctor(arguments: argparse.Namespace) -> int:
    """Whether everything a run needs is there."""
    checks = _door(arguments).doctor()
    lines = [
        f"{check.state:4}  {check.name}: {check.sentence}"
        + (f"\n      try: {named(check.remedy)}" if check.remedy else "")
        for check in checks
    ]
    _print(arguments, [check.record() for check in checks], "\n".join(lines))
    return max((check.code for check in checks), default=Code.OK)


def _agreed(question: str) -> bool:
    """The answer of a person. Raises Refused where there is none: a script is not to believe that it was done."""
    if not sys.stdin.isatty():
        raise Refused(f"{question} Nobody is here to answer, and nothing was done; --yes answers")
    print(fit(f"{question} [y/N] ", sys.stderr), end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _door(arguments: argparse.Namespace) -> "Door":
    from launcher.verbs import Door

    return Door(arguments.profile, say)


def _print(arguments: argparse.Namespace, value: Any, plain: str | None = None) -> None:
    """A value in the format that was asked for; ``plain`` is the table's form of it, nothing if it is empty."""
    from launcher.show import as_text

    text = plain if plain is not None and arguments.output == "table" else as_text(value, arguments.output)
    if text:
        show(text)


def _again(*words: str) -> str:
    return shlex.join(["tunejob", *words])
