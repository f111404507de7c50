"""A few prepared rows as people can read them, with what is trained of each marked: only where a user asks for them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from job.data.prepared import IGNORED, Prepared, Rows
from job.storage.store import translated

COUNT = 10
"""Rows shown of each set."""
OPEN, CLOSE = "⟦", "⟧"


def write_samples(path: Path, data: Prepared, tokenizer: Any) -> int:
    """Writes the samples, in place of what was there; how many.

    Raises:
        JobError: the file cannot be written, as the operating system says.
    """
    blocks = [*_blocks("training", data.train, tokenizer), *_blocks("evaluation", data.eval, tokenizer)]
    head = f"# Between {OPEN} and {CLOSE} stands what is trained; the rest is only read.\n"
    with translated(f"--samples {path}: cannot be written", path.absolute().parent):
        path.write_text(head + "".join(blocks), encoding="utf-8")
    return len(blocks)


def _blocks(words: str, rows: Rows | None, tokenizer: Any) -> Iterator[str]:
    if rows is None:
        return
    for i in chosen(rows.lengths):
        head = f"# {words} row {rows.origin(i)}: {rows.lengths[i]} tokens, {rows.supervised[i]} trained"
        yield f"\n{head}\n{marked(rows.tokens(i), rows.labels(i), tokenizer)}\n"


def chosen(lengths: Any) -> list[int]:
    """The first rows, some spread over the rest, and the longest: at most ``COUNT``, in order."""
    count = len(lengths)
    spread = np.linspace(0, count - 1, COUNT - 1).astype(int).tolist()
    return sorted({*spread, int(np.argmax(lengths))}) if count else []


def marked(tokens: Any, labels: Any, tokenizer: Any) -> str:
    """The text of a row, special tokens included, with marks around its trained stretches."""
    is_trained = labels != IGNORED
    edges = np.flatnonzero(np.diff(is_trained)) + 1
    parts = zip(np.split(tokens, edges), np.split(is_trained, edges), strict=True)
    texts = ((tokenizer.decode(part.tolist()), bool(flags[0])) for part, flags in parts if len(part))
    return "".join(f"{OPEN}{text}{CLOSE}" if trained else text for text, trained in texts)
