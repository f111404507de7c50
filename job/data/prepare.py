"""``python -m job.data.prepare WORKDIR``: reads the data, splits it, tokenises it, and says what became of it.

Leaves the sealed folder ``WorkDir.prepared``: train/ and eval/ (see ``job.data.prepared``), tokenizer/ with the chat
template that was used, report.json for people and prepared.json for the worker.
"""

import hashlib
import logging
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from job import outcome
from job.child import setup_child
from job.data import chat
from job.data.data_report import check_enough, lines_of, no_evaluation, not_used, sources_of
from job.data.encode import Encoder
from job.data.equal_rows import EqualRows
from job.data.formats import Shape, columns_of
from job.data.prepared import EVAL, INFO, REPORT, TOKENIZER, TRAIN
from job.data.recogniser import Recogniser
from job.data.row_maker import Batch, Made, RowMaker, batches, in_order, processes_for
from job.data.row_writer import Limits, RowWriter
from job.data.rows import BadRow, BadRows, Row, begins_with_header, items
from job.data.tokenizing import open_tokenizer
from job.exits import ExitCode
from job.files import sealing, write_json
from job.inputs import Input, Inputs, read_inputs
from job.libraries import asks_much_of_the_model
from job.spec import JobSpec, read
from job.workdir import WorkDir

log = logging.getLogger(__name__)


def prepare(workdir: WorkDir) -> ExitCode:
    """Leaves ``workdir.prepared``.

    Raises:
        DataInvalid: a file cannot be read, or too little of it can be trained on.
        SpecInvalid: the model and what the spec asks of it do not go together.
    """
    spec, inputs = read(workdir.spec), read_inputs(workdir.inputs)
    with sealing(workdir.prepared) as folder:
        for line in lines_of(prepare_into(folder, spec, inputs)):
            log.info("%s", line)
    return ExitCode.OK


def prepare_into(folder: Path, spec: JobSpec, inputs: Inputs) -> dict[str, Any]:
    """Fills an empty folder with rows, tokenizer and records; the report, as it also stands there.

    Raises:
        JobError: as ``prepare``.
    """
    tokenizer, limits = open_tokenizer(inputs.model, spec)
    template = chat.choose(spec.data.chat_template, tokenizer)
    if asks_much_of_the_model(spec):  # else torch may not be at hand: see there
        from job.training.adapter import foreseen
        from job.training.model import check_targets
        from job.training.new_tokens import Tokens

        check_targets(inputs.model.path, spec)
        foreseen(inputs.model.path, spec, Tokens.of(spec, _tokens(spec, tokenizer)))
    pass_ = Pass(spec, inputs, template, tokenizer, limits, folder)
    pass_.run()
    return pass_.write()


def _tokens(spec: JobSpec, tokenizer: Any) -> dict[str, Any]:
    """What the worker must know of the vocabulary: tokens in all, and the ids of new ones."""
    return {
        "vocabulary": len(tokenizer),
        "new_tokens": tokenizer.convert_tokens_to_ids(list(spec.lora.new_tokens)),
    }


class Pass:
    """One pass over all files."""

    def __init__(
        self,
        spec: JobSpec,
        inputs: Inputs,
        template: chat.ChatTemplate | None,
        tokenizer: Any,
        limits: Limits,
        folder: Path,
    ) -> None:
        self.spec = spec
        self.inputs = inputs
        self.template = template
        self.tokenizer = tokenizer
        self.limits = limits
        self.folder = folder
        self.bad = BadRows(spec.data.max_bad_rows)
        self.equal = EqualRows()
        self.shapes: dict[str, Shape] = {}
        self.split_from = 0
        self.encoder = Encoder(tokenizer, spec.data.train_on)
        self.train = RowWriter(folder / TRAIN, self.encoder, limits)
        self.eval = RowWriter(folder / EVAL, self.encoder, limits)
        self.digest = ""
        self.eval_digest = ""

    def run(self) -> None:
        """Reads, splits and writes every row; refuses what could not be trained on."""
        with closing(self._made(self.inputs.train)) as made:
            for row in made:
                self._place(row)
        if self.inputs.eval is not None:
            with closing(self._made([self.inputs.eval], are_aside=True)) as made:
                for row in made:
                    self._evaluate(row)
        train_digest, self.eval_digest = self.train.close(), self.eval.close()
        digests = train_digest + self.eval_digest
        self.digest = hashlib.sha256(digests.encode("ascii")).hexdigest()
        check_enough(self.train.counts, self.eval.counts, self.limits, self.spec.data, self.bad)

    def _place(self, row: Made) -> None:
        self.split_from += 1
        if row.is_aside:
            self._evaluate(row)
        elif self.train.add(row):
            self.equal.train(row.key)

    def _evaluate(self, row: Made) -> None:
        if self.eval.add(row):
            self.equal.evaluate(row.key)

    def _made(self, sources: Sequence[Input], are_aside: bool = False) -> Generator[Made, None, None]:
        """The usable rows of files, in order; the others are counted."""
        maker = RowMaker(self.template, self.encoder, 1.0 if are_aside else self.spec.data.eval_split)
        work = (batch for number, source in enumerate(sources) for batch in self._batches(number, source))
        with closing(in_order(maker, work, processes_for([source.path for source in sources]))) as made:
            for row in made:
                if isinstance(row, BadRow):
                    self.bad.skip(row)
                else:
                    yield row

    def _batches(self, number: int, source: Input) -> Iterator[Batch]:
        named = self.spec.data.columns.model_dump(exclude_none=True)
        recogniser = Recogniser(self.spec.data)

        def shape_of(row: Row) -> Shape | BadRow:
            shape = recogniser.shape_of(row)
            if isinstance(shape, Shape):
                self._accept(shape, source)
            return shape

        return batches(number, items(source, begins_with_header(named), columns_of(named)), shape_of)

    def _accept(self, shape: Shape, source: Input) -> None:
        if self.template is None and "messages" in shape.columns:
            raise chat.refuse_messages(source.uri)
        self.shapes[source.uri] = shape

    def write(self) -> dict[str, Any]:
        """Writes the report, the tokenizer and the worker's record beside the rows; the report."""
        report = self._report()
        write_json(self.folder / REPORT, report)
        self.tokenizer.chat_template = self.template.text if self.template is not None else None
        self.tokenizer.save_pretrained(self.folder / TOKENIZER)
        write_json(self.folder / INFO, self._info(report))
        return report

    def _report(self) -> dict[str, Any]:
        train, evaluation = self.train.counts, self.eval.counts
        return {
            "files": {name: str(shape) for name, shape in self.shapes.items()},
            "unused_columns": {name: list(shape.unused) for name, shape in self.shapes.items() if shape.unused},
            "template": self.template.name if self.template is not None else None,
            "sources": sources_of(train, self.spec),
            "train": train.record() | self.equal.in_train(),
            "eval": (evaluation.record() | self.equal.in_evaluation()) if evaluation.kept else None,
            "no_eval": no_evaluation(self.spec, evaluation, self.split_from),
            "bad_rows": dict(self.bad.kinds),
            "bad_examples": self.bad.examples,
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        counts = self.train.counts
        found = [not_used(name, shape.unused) for name, shape in self.shapes.items() if shape.unused]
        if self.template is not None and counts.endings[""] and counts.ways.total() != counts.ways["plain text"]:
            found.append("the chat template ends answers without an end-of-turn token; the model may not learn to stop")
        names = [source.uri for source in self.inputs.train]
        found += [f"{name}: no row of it is trained on" for i, name in enumerate(names) if not counts.source_rows[i]]
        overlap = self.equal.in_evaluation()["also_in_train"]
        if overlap:
            found.append(f"{overlap} evaluation rows are trained on, too; the evaluation is too good by them")
        if counts.unlike_prompt:
            found.append(
                f"{counts.unlike_prompt} rows do not begin with the prompt the model is asked with when served"
            )
        return found

    def _info(self, report: Mapping[str, Any]) -> dict[str, Any]:
        ends = [token for token in self.train.counts.endings if token]
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        end_of_turn = self.tokenizer.convert_tokens_to_ids(ends)
        end_ids = sorted({*end_of_turn, *([eos] if eos is not None else [])})
        evaluation = self.inputs.eval
        names = [source.uri for source in self.inputs.train]
        return {
            "digest": self.digest,
            "eval_digest": self.eval_digest,
            "sources": names,
            "eval_sources": [evaluation.uri] if evaluation is not None else names,
            "eos_id": eos,
            "pad_id": next(token for token in (pad, eos, 0) if token is not None),
            "end_of_turn": end_of_turn,
            "end_ids": end_ids,
            "template": report["template"],
            "masks": report["train"]["masks"],
            "no_eval": report["no_eval"],
            **_tokens(self.spec, self.tokenizer),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """The process the supervisor starts."""
    (root,) = sys.argv[1:] if arguments is None else arguments
    setup_child()
    workdir = WorkDir(Path(root))
    return outcome.record(workdir.outcome("prepare"), lambda: prepare(workdir), lambda error: None)


if __name__ == "__main__":
    sys.exit(main())
