"""``python -m job.look``: what a spec's model and data are, and what training would make of them. No weights.

Where the tokenizer can be read, the rows are prepared as in a run, and the report is that of the run.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from job.data.data_report import lines_of
from job.data.formats import columns_of, example_of
from job.data.prepare import prepare_into
from job.data.prepared import TOKENIZER, load
from job.data.recogniser import Recogniser
from job.data.row_error import RowError
from job.data.rows import BadRow, BadRows, begins_with_header, read_rows
from job.errors import DataInvalid, JobError
from job.exits import ExitCode
from job.inputs import Input, Inputs
from job.sizing.fits import lines_of as estimated
from job.sizing.shapes import UnknownFamily
from job.spec import JobSpec, read
from job.storage.hub import here
from job.storage.store import size_text
from job.supervision.pull import Survey, survey

log = logging.getLogger("job")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def look(spec: JobSpec, samples: Path | None = None, room: int | None = None) -> Iterator[str]:
    """Lines for people: the model, and the report on the data.

    Args:
        samples: file to write some rows to, with what is trained of each.
        room: bytes of one device, to say whether the training fits it.

    Raises:
        JobError: as a run would be refused, naming the key, or of a row file and number.
    """
    with tempfile.TemporaryDirectory(prefix="tunejob-") as name:
        folder = Path(name)
        found = survey(spec, folder / "inputs")
        inputs = [*found.inputs.train, *([found.inputs.eval] if found.inputs.eval else [])]
        names = {source.uri for source in inputs}
        files = [piece for piece in found.pieces if piece.name not in names]
        size = size_text(sum(piece.size for piece in files))
        # Rows and tokenizer have to be read whole; the weights have not.
        small = tuple(piece for piece in found.pieces if not piece.name.endswith(_WEIGHTS))
        brought: Survey = replace(found, pieces=small, hub_name=None)
        brought.bring()
        model = found.inputs.model if found.hub_name is None else _of_hub(found.hub_name, found.commit)
        if model is None:
            yield f"model {spec.model.name}: of the hub, and not in this machine's cache; not looked at before the run"
            yield from _counted(spec, inputs)
            return
        yield f"model {spec.model.name}: " + (f"{len(files)} files, {size}" if files else "in this machine's hub cache")
        yield from _prepared(spec, replace(found.inputs, model=model), folder / "prepared", samples)
        yield from _memory(model.path, spec, room)


def _memory(folder: Path, spec: JobSpec, room: int | None) -> Iterator[str]:
    """What the training will hold of the device; torch comes in only for a model of an unusual family."""
    try:
        yield from estimated(folder, spec, room)
    except UnknownFamily:
        from job.sizing.built import memory_of

        yield from memory_of(folder, spec, room)


def _of_hub(name: str, revision: str | None) -> Input | None:
    folder = here(name, revision)
    return None if folder is None else Input(name, folder)


def _prepared(spec: JobSpec, inputs: Inputs, folder: Path, samples: Path | None) -> Iterator[str]:
    folder.mkdir()
    yield from lines_of(prepare_into(folder, spec, inputs))
    if samples is not None:
        from transformers import AutoTokenizer

        from job.data.samples import write_samples

        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
        count = write_samples(samples, load(folder), tokenizer)
        yield f"{samples}: {count} rows as they are trained"


def _counted(spec: JobSpec, inputs: Sequence[Input]) -> Iterator[str]:
    """What can be said without the tokenizer."""
    bad = BadRows(spec.data.max_bad_rows)
    for source in inputs:
        yield _count(spec, source, bad)
    yield "not known without the model's tokenizer: lengths, dropped and cut rows, trained tokens, samples"


def _count(spec: JobSpec, source: Input, bad: BadRows) -> str:
    named = spec.data.columns.model_dump(exclude_none=True)
    recogniser, shape, usable, skipped = Recogniser(spec.data), None, 0, 0
    for row in read_rows(source, bad, begins_with_header(named), columns_of(named)):
        found = shape or recogniser.shape_of(row)
        if isinstance(found, BadRow):
            bad.skip(found)
            skipped += 1
            continue
        shape = found
        try:
            example_of(row.values, shape, spec.data.chat_template != "none")
            usable += 1
        except RowError as problem:
            bad.skip(BadRow(row.source, row.number, problem.kind, str(problem)))
            skipped += 1
    if not usable:
        raise DataInvalid(f"{source.uri}: no row that can be trained on")
    return f"{source.uri}: {usable:,} rows, {shape}" + (f"; {skipped:,} left out" if skipped else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is there; the code says whose problem it is (``job.exits``)."""
    from job.supervision.announce import setup_logging

    parser = argparse.ArgumentParser(prog="python -m job.look", description="Looks at a spec's inputs.")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--room", type=int, help="bytes of one device")
    setup_logging()
    options = parser.parse_args(arguments)
    try:
        for line in look(read(options.spec), options.samples, options.room):
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
