"""The arguments of the commands that ask a cluster, and which function carries out each."""

import argparse
from collections.abc import Callable

from launcher import commands

Command = Callable[[argparse.Namespace], int]
Add = Callable[[str, str], argparse.ArgumentParser]


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


def add_format(parser: argparse.ArgumentParser) -> None:
    """-o: how a result is printed."""
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
    add_format(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="do not follow it")
    parser.add_argument("--replace", action="store_true", help="take another active Job of the same run away first")

    parser = add("list", "list the runs of the namespace")
    add_profile(parser)
    add_format(parser)

    for name, what in (("status", "show one run"), ("why", "say why a run waits, failed, or is where it is")):
        parser = add(name, what)
        _add_run(parser)
        add_format(parser)

    parser = add("logs", "print the log of every attempt, as text")
    _add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--tail", metavar="N", type=int, help="only the last N lines of each attempt")

    parser = add("wait", "wait until a run has ended; the exit code says how")
    _add_run(parser)
    add_format(parser)
    parser.add_argument("--timeout", metavar="TIME", type=_seconds, help="at most so long (90, 15m, 2h)")
    parser.add_argument("--start-timeout", metavar="TIME", type=_seconds, help="at most so long until a pod runs")
    parser.add_argument("--verify", action="store_true", help="prove every file in the store when it is complete")

    parser = add("results", "show what a finished run left, and fetch it")
    _add_run(parser, "a run on the cluster, or the folder of one (a path, s3://...)")
    add_format(parser)
    parser.add_argument("--download", metavar="DIR", help="fetch the adapter and what belongs to it, verified")
    parser.add_argument("--all", action="store_true", help="with --download: checkpoints and the run's records too")
    parser.add_argument("--verify", action="store_true", help="prove size and SHA-256 of every published file")

    parser = add("retry", "make a new Job where a failed one stands; it goes on from the last checkpoint")
    _add_run(parser)
    add_format(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="do not follow it")

    parser = add("cancel", "end a run; what it committed is kept")
    _add_run(parser)
    add_format(parser)

    parser = add("delete", "take a run off the cluster")
    _add_run(parser)
    add_format(parser)
    parser.add_argument("--data", action="store_true", help="delete what it left in the store too")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")

    parser = add("doctor", "check that everything a run needs is there")
    add_profile(parser)
    add_format(parser)
    return {
        "render": commands.render,
        "submit": commands.submit,
        "list": commands.listed,
        "status": commands.status,
        "logs": commands.logs,
        "wait": commands.wait,
        "why": commands.why,
        "results": commands.results,
        "retry": commands.retry,
        "cancel": commands.cancel,
        "delete": commands.delete,
        "doctor": commands.doctor,
    }
