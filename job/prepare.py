"""``python -m job.prepare WORKDIR``: reads the data, splits it, tokenises it, and says what became of it.

Leaves the sealed folder ``WorkDir.prepared``: train/ and eval/ (see ``job.prepared``), tokenizer/ with the chat
template that was used, report.json for people and prepared.json for the worker.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job import chat, outcome
from job.child import setup_child
from job.data_report import check_enough, lines_of, no_evaluation
from job.encode import Encoder
from job.errors import InputMissing, SpecInvalid
from job.exits import ExitCode
from job.files import read_json, sealing, write_json
from job.formats import Example, Shape, example_of, is_set_aside, key_of, recognise
from job.inputs import Input, Inputs, read_inputs
from job.prepared import EVAL, INFO, REPORT, TOKENIZER, TRAIN
from job.row_writer import Limits, RowWriter
from job.rows import BadRows, Row, RowError, read_rows
from job.spec import JobSpec, read
from job.workdir import WorkDir

log = logging.getLogger(__name__)

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
"""What model configs call the number of positions."""


def prepare(workdir: WorkDir) -> ExitCode:
    """Leaves ``workdir.prepared``.

    Raises:
        DataInvalid: a file cannot be read, or too little of it can be trained on.
        SpecInvalid: the model and what the spec asks of it do not go together.
    """
    spec, inputs = read(workdir.spec), read_inputs(workdir.inputs)
    config = _model_config(inputs.model)
    limits = Limits(spec.training.max_length, spec.training.long_rows, _vocabulary(config))
    _check_length(spec.training.max_length, config)
    tokenizer = _tokenizer(inputs.model)
    template = chat.choose(spec.data.chat_template, tokenizer)
    if spec.lora.target_modules != "all-linear" or spec.lora.modules_to_save:
        from job.model import check_targets  # torch and peft take seconds to import, and most specs name no layer

        check_targets(inputs.model.path, spec)
    with sealing(workdir.prepared) as folder:
        pass_ = Pass(spec, inputs, template, tokenizer, limits, folder)
        pass_.run()
        pass_.write()
    return ExitCode.OK


@dataclass
class _Seen:
    """Keys of training examples, to find equal ones; half a digest is plenty."""

    keys: set[bytes] = field(default_factory=set)
    duplicates: int = 0
    overlap: int = 0

    def train(self, key: bytes) -> None:
        """Counts a training row that was there before."""
        self.duplicates += key[:16] in self.keys
        self.keys.add(key[:16])

    def evaluate(self, key: bytes) -> None:
        """Counts an evaluation row that is trained on; call it after the training rows."""
        self.overlap += key[:16] in self.keys


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
        self.seen = _Seen()
        self.shapes: dict[str, str] = {}
        self.split_from = 0
        encoder = Encoder(tokenizer, spec.data.train_on)
        self.train = RowWriter(folder / TRAIN, encoder, limits)
        self.eval = RowWriter(folder / EVAL, encoder, limits)
        self.digest = ""
        self.eval_digest = ""

    def run(self) -> None:
        """Reads, splits and writes every row; refuses what could not be trained on."""
        for index, source in enumerate(self.inputs.train):
            for row, example, rendered in self._examples(source):
                self._place(row, index, example, rendered)
        if self.inputs.eval is not None:
            for row, example, rendered in self._examples(self.inputs.eval):
                self.seen.evaluate(key_of(example))
                self.eval.add(row, 0, rendered)
        train_digest, self.eval_digest = self.train.close(), self.eval.close()
        digests = train_digest + self.eval_digest
        self.digest = hashlib.sha256(digests.encode("ascii")).hexdigest()
        check_enough(self.train.counts, self.eval.counts, self.limits, self.spec.data.max_dropped)

    def _place(self, row: Row, index: int, example: Example, rendered: chat.Rendered) -> None:
        key = key_of(example)
        self.split_from += 1
        if is_set_aside(key, self.spec.data.eval_split):
            self.eval.add(row, index, rendered)
        else:
            self.seen.train(key)
            self.train.add(row, index, rendered)

    def _examples(self, source: Input) -> Iterator[tuple[Row, Example, chat.Rendered]]:
        """The usable rows of a file, as examples and as text."""
        named = self.spec.data.columns.model_dump(exclude_none=True)
        has_header = not named or not all(name.isdigit() for name in named.values())
        shape: Shape | None = None
        for row in read_rows(source, self.bad, has_header):
            if shape is None:
                shape = recognise(row.values, self.spec.data.format, named, row.origin)
                self._accept(shape, source)
            try:
                example = example_of(row.values, shape, self.template is not None)
                yield row, example, chat.render(example, self.template)
            except RowError as problem:
                self.bad.skip(row.source, row.number, problem)

    def _accept(self, shape: Shape, source: Input) -> None:
        if self.template is None and "messages" in shape.columns:
            raise chat.refuse_messages(source.uri)
        self.shapes[source.uri] = str(shape)

    def write(self) -> None:
        """Writes the report, the tokenizer and the worker's record beside the rows."""
        report = self._report()
        write_json(self.folder / REPORT, report)
        self.tokenizer.chat_template = self.template.text if self.template is not None else None
        self.tokenizer.save_pretrained(self.folder / TOKENIZER)
        write_json(self.folder / INFO, self._info(report))
        for line in lines_of(report):
            log.info("%s", line)

    def _report(self) -> dict[str, Any]:
        train, evaluation = self.train.counts, self.eval.counts
        return {
            "files": self.shapes,
            "template": self.template.name if self.template is not None else None,
            "train": train.record() | {"duplicates": self.seen.duplicates},
            "eval": (evaluation.record() | {"also_in_train": self.seen.overlap}) if evaluation.kept else None,
            "no_eval": no_evaluation(self.spec, evaluation, self.split_from),
            "bad_rows": dict(self.bad.kinds),
            "bad_examples": self.bad.examples,
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        counts = self.train.counts
        found = []
        if self.template is not None and counts.endings[""] and counts.ways.total() != counts.ways["plain text"]:
            found.append("the chat template ends answers without an end-of-turn token; the model may not learn to stop")
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
        }


def _model_config(model: Input) -> Mapping[str, Any]:
    try:
        config = read_json(model.path / "config.json")
    except FileNotFoundError:
        raise InputMissing(f"model.from: {model.uri} has no config.json; name a folder or hub id of a model") from None
    except ValueError as error:
        raise SpecInvalid(f"model.from: config.json of {model.uri} is not JSON ({error})") from error
    # Models that also see or hear keep the figures of their language part one level down.
    return {**config, **(config.get("text_config") or {})}


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    size = config.get("vocab_size")
    return size if isinstance(size, int) else None


def _check_length(max_length: int, config: Mapping[str, Any]) -> None:
    key = next((key for key in _POSITIONS if isinstance(config.get(key), int)), None)
    if key is not None and max_length > config[key] > 0:
        raise SpecInvalid(
            f"training.max_length: {max_length} tokens, and the model has {config[key]} positions ({key} in its "
            f"config.json); write {config[key]} or less"
        )


def _tokenizer(model: Input) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its loaders raise whatever their formats do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(str(model.path), model.uri)
        raise SpecInvalid(
            f"model.from: the tokenizer of {model.uri} cannot be loaded ({reason}); the model needs a tokenizer.json, "
            "and code of its own is not run"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The process the supervisor starts."""
    (root,) = sys.argv[1:] if arguments is None else arguments
    setup_child()
    workdir = WorkDir(Path(root))
    return outcome.record(workdir.outcome("prepare"), lambda: prepare(workdir), lambda error: None)


if __name__ == "__main__":
    sys.exit(main())
