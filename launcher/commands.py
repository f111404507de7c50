"""The commands that ask a cluster: their arguments, and what they print. The work is done in ``launcher.verbs``."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.codes import Code, Detached, NoResult, RunFailed

if TYPE_CHECKING:
    from launcher.runs import Run
    from launcher.submit import Submitted
    from launcher.verbs import Door

Command = Callable[[argparse.Namespace], int]
Add = Callable[[str, str], argparse.ArgumentParser]


def say(line: str) -> None:
    """Talk goes to stderr: what a command gives can be piped."""
    print(line, file=sys.stderr, flush=True)


def render(arguments: argparse.Namespace) -> int:
    """Prints the manifests of a spec, or writes them to a folder."""
    from job.spec import read
    from launcher.render import to_yaml
    from launcher.verbs import bundle, rendered

    spec = read(Path(arguments.spec), arguments.set)
    if arguments.output is None:
        print(to_yaml(rendered(spec, arguments.profile).objects), end="")
        return Code.OK
    for path in bundle(Path(arguments.output), spec, arguments.profile, arguments.rerender):
        print(path)
    return Code.OK


def submit(arguments: argparse.Namespace) -> int:
    """Submits a spec; on a terminal it follows the run to its end."""
    from job.spec import read

    spec = read(Path(arguments.spec), arguments.set)
    door = _door(arguments)
    return _submitted(arguments, door, door.submit(spec, arguments.replace))


def retry(arguments: argparse.Namespace) -> int:
    """Makes a new Job where a failed one stands."""
    door = _door(arguments)
    return _submitted(arguments, door, door.retry(arguments.run))


def _submitted(arguments: argparse.Namespace, door: "Door", submitted: "Submitted") -> int:
    run = submitted.run
    say(f"{run.id}: {'submitted' if submitted.is_new else run.state} as {run.kube_job['kind']} {run.job}")
    is_watched = not (arguments.detach or run.is_schedule or run.has_ended) and sys.stderr.isatty()
    if is_watched:
        return _followed(door, run)
    _print(arguments, {"run": run.id, "job": run.job, "state": run.state, "namespace": run.namespace}, run.id)
    if not (run.is_schedule or run.has_ended):
        say(f"to follow it: {_again('logs', '-f', run.id)}")
    return Code.OK


def _followed(door: "Door", run: "Run", tail: int | None = None) -> int:
    """Shows a run to its end, and what came of it."""
    from launcher.watch import follow

    try:
        return _ended(door, follow(door.cluster, run, say, _show, door.causes, tail=tail))
    except KeyboardInterrupt:
        again = _again("logs", "-f", run.id)
        raise Detached(
            f"\ndetached; {run.id} goes on. To come back: {again}. To end it: tunejob cancel {run.id}"
        ) from None


def _show(line: Any) -> None:
    """One line of a log: progress as people read it, everything else as it is."""
    from launcher.show import progress_line
    from launcher.stream import progress

    word = progress(line.text)
    print(line.text if word is None else progress_line(word), flush=True)


def _ended(door: "Door", run: "Run") -> int:
    """Says how a run ended; the code is that of ``launcher.watch.outcome``."""
    from launcher.watch import outcome

    code = outcome(run, lambda: _has_manifest(door, run))
    if code == Code.JOB_FAILED:
        cause = next(iter(door.causes(run)), None)
        said = f"{cause.sentence}\n{cause.remedy}" if cause else run.message
        raise RunFailed(f"{run.id} failed: {said}")
    if code == Code.NO_RESULT:
        raise NoResult(f"{run.job} is complete, but there is no manifest below {run.output}: was the folder deleted?")
    say(f"{run.id}: complete; {_again('results', run.id)} shows what it left")
    return code


def _has_manifest(door: "Door", run: "Run") -> bool:
    """Whether the store has the run's manifest; a store that cannot be asked from here is not the run's failure."""
    from job.errors import JobError
    from job.layout import MANIFEST

    try:
        return door.store(run).read(MANIFEST) is not None
    except JobError as error:
        say(f"no pod is left to say what was published, and the store cannot be asked: {error}")
        return True


def listed(arguments: argparse.Namespace) -> int:
    """Every run of the namespace."""
    from launcher import show

    door = _door(arguments)
    runs = door.runs()
    _print(arguments, [show.listed(run) for run in runs])
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
            print(line.text)
        return Code.OK
    return _followed(door, door.find(arguments.run), arguments.tail)


def wait(arguments: argparse.Namespace) -> int:
    """Waits for the end of a run."""
    door = _door(arguments)
    run = door.find(arguments.run)
    try:
        ended = door.await_end(run, arguments.timeout, arguments.start_timeout)
    except KeyboardInterrupt:
        raise Detached(f"\nno longer waiting; {run.id} goes on. To wait again: {_again('wait', run.id)}") from None
    if arguments.verify and not ended.condition("Failed"):
        from launcher.verbs import results_of

        say(results_of(ended.id, arguments.profile, say).verified())
    return _ended(door, ended)


def why(arguments: argparse.Namespace) -> int:
    """Why a run is where it is."""
    causes = _door(arguments).why(arguments.run)
    if arguments.output != "table":
        _print(arguments, [cause.record() for cause in causes])
    else:
        print("\n\n".join(cause.text() for cause in causes))
    return Code.OK


def results(arguments: argparse.Namespace) -> int:
    """What a finished run left, in the cluster's store or in a folder."""
    from launcher.verbs import results_of

    found = results_of(arguments.run, arguments.profile, say)
    if arguments.verify or arguments.download:
        say(found.verified())
    left = found.results
    if arguments.download:
        for path in found.download(Path(arguments.download), arguments.all):
            say(str(path))
        left = replace(left, uri=arguments.download)
    if arguments.output == "table":
        from launcher.summary import summary

        print(summary(left))
    else:
        _print(arguments, dict(left.record))
    return Code.OK


def cancel(arguments: argparse.Namespace) -> int:
    """Ends a run; what it committed is kept."""
    run = _door(arguments).cancel(arguments.run)
    kept = run.output or "its output"
    say(f"{run.id}: cancelled; what was committed is kept below {kept}, and submitting it again goes on from there")
    return Code.OK


def delete(arguments: argparse.Namespace) -> int:
    """Takes a run off the cluster, after asking."""
    door = _door(arguments)
    what = "Jobs, pods and logs" + (" and EVERYTHING IT LEFT IN THE STORE" if arguments.data else "")
    if not arguments.yes and not _agreed(
        f"delete {what} of {arguments.run} in namespace {door.cluster.namespace}? [y/N] "
    ):
        say("nothing was deleted")
        return Code.OK
    for name in door.delete(arguments.run, arguments.data):
        say(f"deleted {name}")
    return Code.OK


def doctor(arguments: argparse.Namespace) -> int:
    """Whether everything a run needs is there."""
    checks = _door(arguments).doctor()
    if arguments.output == "table":
        for check in checks:
            print(
                f"{check.state:4}  {check.name}: {check.sentence}"
                + (f"\n      try: {check.remedy}" if check.remedy else "")
            )
    else:
        _print(arguments, [check.record() for check in checks])
    return max((check.code for check in checks), default=Code.OK)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        say("tunejob: nobody to ask; --yes answers the question")
        return False
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _door(arguments: argparse.Namespace) -> "Door":
    from launcher.verbs import Door

    return Door(arguments.profile, say)


def _print(arguments: argparse.Namespace, value: Any, plain: str | None = None) -> None:
    """A value in the format that was asked for; ``plain`` is the table's form of it."""
    from launcher.show import as_text

    if plain is not None and arguments.output == "table":
        print(plain)
    elif text := as_text(value, arguments.output):
        print(text)


def _again(*words: str) -> str:
    return shlex.join(["tunejob", *words])


def _seconds(text: str) -> float:
    """A time: ``90``, ``90s``, ``15m``, ``2h``."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90, 90s, 15m or 2h") from None


def add_profile(parser: argparse.ArgumentParser) -> None:
    """-p: which cluster."""
    parser.add_argument(
        "-p",
        "--profile",
        metavar="NAME|FILE",
        help="the cluster's profile ($TUNEJOB_PROFILE, ./tunejob.profile.yaml, ~/.config/tunejob/default.yaml)",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=("table", "json", "yaml"), default="table", help="how it is printed")


def _add_run(
    parser: argparse.ArgumentParser, what: str = "its id, its Job's name, the beginning of one, or FILE of its spec"
) -> None:
    parser.add_argument("run", metavar="RUN", help=what)
    add_profile(parser)


def add_to(add: Add, add_spec: Callable[[argparse.ArgumentParser], None]) -> dict[str, Command]:
    """Adds the parsers of every command here, and gives the commands."""
    parser = add("render", "print the manifests of a spec, or write them to a folder")
    add_spec(parser)
    add_profile(parser)
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for `kubectl apply -k DIR` and GitOps")
    parser.add_argument("--rerender", action="store_true", help="write files of the same run again, after an upgrade")

    parser = add("submit", "put a run on the cluster; on a terminal follow it")
    add_spec(parser)
    add_profile(parser)
    _add_format(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="do not follow it")
    parser.add_argument("--replace", action="store_true", help="take another active Job of the same run away first")

    parser = add("list", "list the runs of the namespace")
    add_profile(parser)
    _add_format(parser)

    for name, what in (("status", "show one run"), ("why", "say why a run waits, failed, or is where it is")):
        parser = add(name, what)
        _add_run(parser)
        _add_format(parser)

    parser = add("logs", "print the log of every attempt")
    _add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--tail", metavar="N", type=int, help="only the last N lines of each attempt")

    parser = add("wait", "wait until a run has ended; the exit code says how")
    _add_run(parser)
    parser.add_argument("--timeout", metavar="TIME", type=_seconds, help="at most so long (90, 15m, 2h)")
    parser.add_argument("--start-timeout", metavar="TIME", type=_seconds, help="at most so long until a pod runs")
    parser.add_argument("--verify", action="store_true", help="prove every file in the store when it is complete")

    parser = add("results", "show what a finished run left, and fetch it")
    _add_run(parser, "a run on the cluster, or the folder of one (a path, s3://...)")
    _add_format(parser)
    parser.add_argument("--download", metavar="DIR", help="fetch the adapter and what belongs to it, verified")
    parser.add_argument("--all", action="store_true", help="with --download: checkpoints and the run's records too")
    parser.add_argument("--verify", action="store_true", help="prove size and SHA-256 of every published file")

    parser = add("retry", "make a new Job where a failed one stands; it goes on from the last checkpoint")
    _add_run(parser)
    _add_format(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="do not follow it")

    _add_run(add("cancel", "end a run; what it committed is kept"))

    parser = add("delete", "take a run off the cluster")
    _add_run(parser)
    parser.add_argument("--data", action="store_true", help="delete what it left in the store too")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")

    parser = add("doctor", "check that everything a run needs is there")
    add_profile(parser)
    _add_format(parser)
    return {
        "render": render,
        "submit": submit,
        "list": listed,
        "status": status,
        "logs": logs,
        "wait": wait,
        "why": why,
        "results": results,
        "retry": retry,
        "cancel": cancel,
        "delete": delete,
        "doctor": doctor,
    }
