"""One rank of a run: what it has to know, and how it tells the supervisor where it is."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from job.data import prepared
from job.files import write_json
from job.sizing.parts import Part
from job.spec import JobSpec
from job.training.course import Course
from job.training.device import Placement
from job.training.memory import peak_bytes, reset_peak
from job.workdir import WorkDir


@dataclass
class Worker:
    """One rank of a run."""

    workdir: WorkDir
    spec: JobSpec
    placement: Placement
    data: prepared.Prepared
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    last_word: float = 0.0
    position: dict[str, Any] = field(default_factory=dict)
    """Step, steps and the step's loss, once they are known; part of every word."""
    resumed_tokens: int = 0
    """Tokens that earlier attempts trained on."""
    course: Course = field(default_factory=Course)
    """How the evaluation loss went so far."""
    parts: dict[str, Part] = field(default_factory=dict)
    """What is trained, quantised and left alone, by kind."""
    published_step: int = 0
    """The step whose state is published, once it is chosen."""

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what concerns all."""
        return self.placement.rank == 0

    def stop_asked(self) -> bool:
        """The supervisor has asked for a checkpoint and an end."""
        return self.workdir.stop.exists()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase, measures its peak memory, and tells the supervisor."""
        self.tell(phase=name)
        reset_peak(self.placement.device)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self.peaks[name] = peak_bytes(self.placement.device)

    def tell(self, **word: Any) -> None:
        """Leaves the latest word on progress."""
        if self.is_first:
            self.last_word = time.monotonic()
            write_json(self.workdir.progress, without_holes(self.position | word))

    def pulse(self) -> None:
        """Shows the supervisor that something goes on, where there is nothing to say."""
        if self.is_first and time.monotonic() - self.last_word > 1.0:
            self.last_word = time.monotonic()
            os.utime(self.workdir.progress)

    def barrier(self) -> None:
        """Waits for the other ranks."""
        if self.placement.world > 1:
            dist.barrier()

    def note(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        if self.is_first:
            with self.workdir.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(without_holes(line)) + "\n")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as ``prepare`` used it, its chat template included."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.workdir.prepared / "tokenizer", local_files_only=True
        )
        return tokenizer


def without_holes(record: dict[str, Any]) -> dict[str, Any]:
    """The record with null for numbers that JSON has no word for: a step that the loss scale skipped has no norm."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
