"""The rows of ``make bench-train``: public data, as the worker's own preparation tokenises and masks it."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.data import chat
from job.data.encode import Encoded, Encoder
from job.data.formats import Conversation

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

Turn = dict[str, str]


@dataclass(frozen=True)
class Task:
    """What every arm trains and evaluates on: one step to warm up, one that is measured, and an evaluation pass."""

    warm_up: list[list[int]]
    """Tokens of the first step's rows: short ends of rows, as many as the measured step has."""
    tokens: list[list[int]]
    """Of the measured step's rows."""
    held_out: list[list[int]]
    """Of the evaluation's rows."""
    labels: dict[str, list[list[int]]]
    """Of the three, by name; not shifted, -100 where nothing is trained."""
    max_length: int
    micro_batch: int
    """Rows of a micro-batch where an arm counts rows."""
    budget: int
    """Tokens of a micro-batch where an arm counts tokens: one row of the longest kind, as little as is possible."""

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return len(self.tokens)

    @property
    def rows(self) -> list[list[int]]:
        """Tokens of both steps' rows."""
        return [*self.warm_up, *self.tokens]

    @property
    def row_labels(self) -> list[list[int]]:
        """Labels of both steps' rows."""
        return [*self.labels["warm_up"], *self.labels["tokens"]]

    @property
    def useful(self) -> int:
        """Tokens of the measured step."""
        return sum(map(len, self.tokens))

    @property
    def supervised(self) -> int:
        """Trained tokens of the measured step."""
        return sum(label != -100 for row in self.labels["tokens"] for label in row)

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @staticmethod
    def read(path: Path) -> "Task":
        return Task(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Data:
    """A data set's rows, and how they are cut."""

    name: str
    rows: list[Encoded]
    max_length: int
    micro_batch: int = 4

    def task(self, draw: int, batch: int = 8, held_out: int = 16) -> Task:
        """Rows whose lengths are like the whole set's; another ``draw`` gives others."""
        warm_up = sorted(self.rows, key=lambda row: (len(row.tokens), row.tokens.tolist()))[:batch]
        measured = _typical(self.rows, batch, self.micro_batch, draw)
        evaluated = _typical(self.rows, held_out, self.micro_batch, draw + 1000)
        parts = {
            "warm_up": [_end(row) for row in warm_up],
            "tokens": [(row.tokens, row.trained) for row in measured],
            "held_out": [(row.tokens, row.trained) for row in evaluated],
        }
        tokens = {name: [row.tolist() for row, _ in part] for name, part in parts.items()}
        labels = {name: [np.where(mask, row, -100).tolist() for row, mask in part] for name, part in parts.items()}
        return Task(
            **tokens, labels=labels, max_length=self.max_length, micro_batch=self.micro_batch, budget=self.max_length
        )


def _end(row: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """The last tokens of a row and their mask; nothing predicts the first, and not all arms leave it out."""
    trained = row.trained[-WARM_UP:].copy()
    trained[:1] = False
    return row.tokens[-WARM_UP:], trained


WARM_UP = 24
"""Tokens of each row of the step that is not measured."""


def gsm8k() -> Data:
    """Uniform rows: answers of GSM8K's training set, of at most 256 tokens."""
    return Data("GSM8K", [row for row in encoded(_gsm8k(), 1024) if len(row.tokens) <= 256], 256)


def mix() -> Data:
    """Rows of very different lengths: chats, instructions, function calls, and minutes of meetings cut to 1,024."""
    return Data("wide mix", encoded(_mix(), 1024), 1024)


def _typical(rows: list[Encoded], count: int, group: int, draw: int) -> list[Encoded]:
    """Of 500 drawings of ``count`` rows, the one whose mean length and padding are nearest to the whole set's."""

    def shape(lengths: Sequence[int]) -> np.ndarray:
        padded = [_padded(lengths, size) / sum(lengths) for size in (group, 2 * group)]
        return np.array([np.mean(lengths), *padded])

    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    whole = shape([len(rows[index].tokens) for index in order])
    drawn = [random.Random(draw * 1_000_000 + attempt).sample(order, count) for attempt in range(500)]
    best = min(drawn, key=lambda d: float(np.abs(shape([len(rows[i].tokens) for i in d]) / whole - 1).max()))
    return [rows[index] for index in best]


def _padded(lengths: Sequence[int], group: int) -> int:
    """Tokens of the lengths in padded groups."""
    groups = [lengths[start : start + group] for start in range(0, len(lengths), group)]
    return sum(max(part) * len(part) for part in groups)


def encoded(conversations: Iterator[list[Turn]], limit: int) -> list[Encoded]:
    """Conversations in the model's own template; of longer ones the beginning of the prompt is cut, or they go."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    template = chat.choose(None, tokenizer)
    rendered = [(chat.render(Conversation(tuple(turns)), template), False) for turns in conversations]
    encoder = Encoder(tokenizer, "assistant")
    rows = [row if len(row.tokens) <= limit else encoder.cut_prompt(row, limit) for row in encoder.encode(rendered)]
    return [row for row in rows if row is not None and row.supervised]


def _lines(name: str) -> Iterator[Any]:
    with (DATA / name).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _asked(question: str, answer: str) -> list[Turn]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _gsm8k() -> Iterator[list[Turn]]:
    for row, _ in zip(_lines("gsm8k/train.jsonl"), range(1000), strict=False):
        yield _asked(row["question"], row["answer"])


def _mix() -> Iterator[list[Turn]]:
    roles = {"human": "user", "gpt": "assistant"}
    for chat_ in json.loads((DATA / "sharegpt/dummy_conversation.json").read_text(encoding="utf-8"))[:500]:
        yield [{"role": roles[turn["from"]], "content": turn["value"]} for turn in chat_["conversations"]]
    for task in list(_lines("alpaca-seed/seed_tasks.jsonl"))[:175]:
        case = task["instances"][0]
        yield _asked("\n\n".join(filter(None, [task["instruction"], case["input"]])), case["output"])
    for call in list(_lines("fms-hf-tuning/nestful_100_samples_input_output.jsonl"))[:100]:
        yield _asked(call["input"], call["output"])
    for meeting in _lines("qmsum/test.jsonl"):
        said = "\n".join(f"{part['speaker']}: {part['content']}" for part in meeting["meeting_transcripts"])
        for wanted in [*meeting["general_query_list"], *meeting["specific_query_list"]]:
            yield _asked(f"{said}\n\n{wanted['query']}", wanted["answer"])


DATA_SETS = (gsm8k, mix)
