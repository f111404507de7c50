"""The command line: parses, calls, prints and returns a number. All it does can be done from Python (``tunejob``).

Results go to stdout and can be piped, talk goes to stderr. Every import that costs time stands inside the function that
needs it, so that help comes at once.
"""

import argparse
import shlex
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import JobError
from job.exits import ExitCode
from launcher import checking
from launcher.codes import Code, Detached
from launcher.options import Command, add_format, add_profile, add_to
from launcher.terminal import calling_with, say, show

if TYPE_CHECKING:
    from job.spec import JobSpec
    from launcher.local import Finished
    from launcher.profile import Profile

DEFAULT_OUTPUT = "file:./runs"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one command: 0, the code of the run it carried out, or that of the problem it reported."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    arguments = parser.parse_args(words, argparse.Namespace(words=words))
    calling_with(getattr(arguments, "profile", None))
    try:
        return int(commands[arguments.verb](arguments))
    except Detached as left:
        # A terminal shows ^C where its cursor stands.
        say(f"\n{left}" if sys.stderr.isatty() else str(left))
        return left.exit_code
    except JobError as error:
        say(f"tunejob: {error}")
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe has seen enough (`| head`). Closing here keeps the interpreter from trying again.
        sys.stderr.close()
        return ExitCode.OK
    except KeyboardInterrupt:
        say("interrupted")
        return Code.DETACHED
    except Exception:
        traceback.print_exc()
        say("tunejob: a failure nobody foresaw; please report it with the lines above")
        return ExitCode.CRASH


def _check(arguments: argparse.Namespace) -> int:
    from job.spec import read, resolved

    spec = read(Path(arguments.spec), arguments.set)
    profile = _profile(arguments)
    remarks: list[str] = []

    def tell(line: str) -> None:
        remarks.append(line)
        say(line)

    if arguments.cluster:
        checking.against_cluster(spec, arguments.profile, tell)
    elif arguments.profile is not None:
        checking.against_profile(spec, arguments.profile)
    looks = bool(arguments.data or arguments.samples)
    if looks and (code := checking.look_at_data(spec, profile, arguments.samples, arguments.output != "table")):
        return code
    if arguments.print:
        show(_text(arguments, resolved(spec)))
    else:
        _checked(arguments, spec, [] if looks else _memory(spec, profile), remarks)
    return ExitCode.OK


def _text(arguments: argparse.Namespace, spec: "JobSpec") -> str:
    from job.spec import dump
    from launcher.show import as_text

    is_json = arguments.output == "json"
    return as_text(spec.model_dump(mode="json", by_alias=True), "json") if is_json else dump(spec).rstrip("\n")


def _checked(arguments: argparse.Namespace, spec: "JobSpec", memory: list[str], remarks: list[str]) -> None:
    """Prints what a good spec comes to. Why there is no estimate of its memory is talk, an estimate a result."""
    from job.spec import run_id
    from launcher.show import as_text

    record = {"run": run_id(spec), "method": spec.method, "model": spec.model.name}
    if arguments.output != "table":
        show(as_text({"spec": arguments.spec, **record, "memory": memory, "remarks": remarks}, arguments.output))
        return
    show(f"{arguments.spec}: ok; run {record['run']}, {spec.method} on {spec.model.name}")
    for line in memory:
        say(line) if len(memory) == 1 else show(line)


def _memory(spec: "JobSpec", profile: "Profile | None") -> list[str]:
    from launcher.memory import lines_of, room_of

    return list(lines_of(spec, room_of(spec, profile)))


def _profile(arguments: argparse.Namespace) -> "Profile | None":
    from launcher.profile import load

    return load(arguments.profile) if arguments.profile is not None or arguments.cluster else None


def _schema(_: argparse.Namespace) -> int:
    import json

    from job.spec import json_schema

    show(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return ExitCode.OK


def _train(arguments: argparse.Namespace) -> int:
    from job.spec import read
    from launcher.local import under, work

    spec = read(Path(arguments.spec), arguments.set)
    return _report(work(spec, under(arguments.output, spec)), arguments.words)


def _train_old(arguments: argparse.Namespace) -> int:
    from launcher.folders import settle
    from launcher.legacy import OldOptions, resuming, spec_of
    from launcher.local import need_libraries, work

    options = OldOptions(**{name: value for name, value in vars(arguments).items() if name in OldOptions.NAMES})
    spec, remarks = spec_of(arguments.verb, options)
    need_libraries(spec)
    now = datetime.now().astimezone()
    folder, set_aside = settle(spec.method, arguments.output_dir, now, arguments.resume, arguments.overwrite)
    for line in remarks:
        say(line)
    if set_aside:
        say(f"the finished run that stood in {folder} is now in {set_aside}")
    say(f"output: {folder}")
    return _report(work(spec, str(folder)), resuming(arguments.words, str(folder)))


def _report(finished: "Finished", again: list[str]) -> int:
    """Prints the results of a run, or the exact line that continues an interrupted one.

    For every other ending the run's own process has already said on the terminal what happened.
    """
    if finished.code == ExitCode.OK:
        from launcher.results import load
        from launcher.summary import summary

        show(summary(load(finished.folder)))
    elif finished.code == ExitCode.INTERRUPTED:
        say(f"interrupted; what was committed so far is kept. To go on:\n  {shlex.join([*_program(), *again])}")
    elif finished.remark:
        say(f"tunejob: {finished.remark}")
    return finished.code


def _compare(arguments: argparse.Namespace) -> int:
    from launcher.compare import table
    from launcher.results import load

    show(table([load(uri) for uri in arguments.runs], arguments.lang))
    return ExitCode.OK


def _merge(arguments: argparse.Namespace) -> int:
    from launcher.merging import merge

    return merge(arguments.adapter, arguments.output, arguments.base, arguments.onto, arguments.dtype)


def _program() -> list[str]:
    """The words that called this program, to be said again to the user."""
    called = Path(sys.argv[0])
    return ["python", sys.argv[0]] if called.suffix == ".py" else [called.name]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _parser() -> tuple[argparse.ArgumentParser, dict[str, Command]]:
    parser = argparse.ArgumentParser(
        prog=" ".join(_program()),
        description="LoRA and QLoRA fine-tuning: one YAML spec in, an adapter and its evaluation out.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    check = _verb(verbs, "check", "validate a spec, or print it with every default spelled out")
    _spec_arguments(check)
    check.add_argument("--print", action="store_true", help="print the resolved spec instead of one line")
    add_profile(check)
    add_format(check)
    check.add_argument(
        "--data", action="store_true", help="prepare the data as a run would, and say what becomes of it"
    )
    check.add_argument("--samples", metavar="FILE", help="the same, and a few rows to FILE, what is trained marked")
    check.add_argument("--cluster", action="store_true", help="ask the cluster of the profile whether it would take it")

    train = _verb(verbs, "train", "train here, without a cluster")
    _spec_arguments(train)
    train.add_argument(
        "--output", metavar="URI", default=DEFAULT_OUTPUT, help="folder of runs; each has a folder of its own in it"
    )

    for verb, kind in (("train-lora", "LoRA"), ("train-qlora", "QLoRA, the base in 4 bits")):
        _old_arguments(_verb(verbs, verb, f"train here with options instead of a spec ({kind})"))

    compare = _verb(verbs, "compare", "put finished runs side by side, as a Markdown table")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    compare.add_argument("--lang", choices=("en", "ja"), default="en", help="language of the table (default: en)")

    merge = _verb(verbs, "merge", "make one model of an adapter and its base")
    merge.add_argument("adapter", metavar="RUN", help="folder of a finished run, or of an adapter")
    merge.add_argument("--output", metavar="DIR", required=True, help="folder for the model; not there yet")
    merge.add_argument("--base", metavar="DIR", help="folder of the base model (default: the one the adapter names)")
    merge.add_argument(
        "--onto",
        choices=("16bit", "dequantised"),
        help="the base's own weights, or those that QLoRA saw (default: dequantised for QLoRA, else 16bit)",
    )
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model (default: the base's)")

    _verb(verbs, "schema", "print the JSON Schema of a spec, for editors")
    return parser, _LOCAL | add_to(lambda name, what: _verb(verbs, name, what), _spec_arguments)


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str
) -> argparse.ArgumentParser:
    # Abbreviated options would make the line that continues a run ambiguous.
    return verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)


def _set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key of the spec, for instance training.learning_rate=1e-4; may be repeated",
    )


def _spec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="FILE", help="the spec (YAML)")
    _set_argument(parser)


def _old_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train-data", metavar="FILE", help="training data: .jsonl, .json, .csv, .tsv or .parquet")
    parser.add_argument(
        "--eval-data", metavar="FILE", help="evaluation data; without it a tenth of the rows is set aside"
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="folder of the run (default: one with date and time under models/fine_tuned_models)",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="configs/config.yaml or a run's training_config.yaml"
    )
    parser.add_argument("--model", metavar="MODEL", help="hub id or folder (default: microsoft/DialoGPT-medium)")
    parser.add_argument(
        "--batch-size", metavar="N", type=_positive, help="rows on the device at a time; lower it when memory runs out"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what was begun in --output-dir")
    again.add_argument("--overwrite", action="store_true", help="set a finished run in --output-dir aside, start anew")
    _set_argument(parser)


_LOCAL: dict[str, Command] = {
    "check": _check,
    "compare": _compare,
    "merge": _merge,
    "schema": _schema,
    "train": _train,
    "train-lora": _train_old,
    "train-qlora": _train_old,
}
