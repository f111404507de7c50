"""``python -m job.look``: whether model and data are where the spec says, and every row can be read. No torch."""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from job.errors import DataInvalid, JobError
from job.exits import ExitCode
from job.formats import example_of, recognise
from job.inputs import Input
from job.pull import Survey, survey
from job.rows import BadRows, RowError, read_rows
from job.spec import JobSpec, read
from job.store import size_text

log = logging.getLogger("job")


def look(spec: JobSpec) -> Iterator[str]:
    """A line for each input: what it is, and how many rows of it can be used.

    Raises:
        InputMissing, AccessDenied, DataInvalid: naming the key, and of a row file and number.
    """
    with tempfile.TemporaryDirectory(prefix="tunejob-") as folder:
        found = survey(spec, Path(folder))
        inputs = [*found.inputs.train, *([found.inputs.eval] if found.inputs.eval else [])]
        names = {source.uri for source in inputs}
        weights = [piece for piece in found.pieces if piece.name not in names]
        size = sum(piece.size for piece in weights)
        yield f"model {spec.model.name}: " + (
            f"{len(weights)} files, {size_text(size)}" if weights else "of the hub; not looked at before the run"
        )
        # Rows have to be read whole; the weights have not.
        data: Survey = replace(found, pieces=tuple(p for p in found.pieces if p.name in names), hub_name=None)
        data.bring()
        bad = BadRows(spec.data.max_bad_rows)
        for source in inputs:
            yield _counted(spec, source, bad)


def _counted(spec: JobSpec, source: Input, bad: BadRows) -> str:
    named = spec.data.columns.model_dump(exclude_none=True)
    has_header = not named or not all(name.isdigit() for name in named.values())
    shape, usable, skipped = None, 0, 0
    for row in read_rows(source, bad, has_header):
        shape = shape or recognise(row.values, spec.data.format, named, row.origin)
        try:
            example_of(row.values, shape, True)
            usable += 1
        except RowError as problem:
            bad.skip(row.source, row.number, problem)
            skipped += 1
    if not usable:
        raise DataInvalid(f"{source.uri}: no row that can be trained on")
    return f"{source.uri}: {usable:,} rows, {shape}" + (f"; {skipped:,} left out" if skipped else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is there; the code says whose problem it is (``job.exits``)."""
    from job.announce import setup_logging

    parser = argparse.ArgumentParser(prog="python -m job.look", description="Looks at a spec's inputs.")
    parser.add_argument("spec", type=Path)
    setup_logging()
    try:
        for line in look(read(parser.parse_args(arguments).spec)):
            print(line, flush=True)
    except JobError as error:
        log.error("tunejob: %s", error)
        return error.exit_code
    except Exception:
        log.exception("a failure nobody foresaw; please report it")
        return ExitCode.CRASH
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
