"""Data as people and programs read it: a table, JSON or YAML. What is shown of a run is decided here."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from launcher.runs import Attempt, Run

FORMATS = ("table", "json", "yaml")


def as_text(value: Any, form: str) -> str:
    """A mapping or a list of them in a format of ``FORMATS``, without a line end."""
    if form == "json":
        return json.dumps(value, indent=2, ensure_ascii=False)
    if form == "yaml":
        from job.strict_yaml import dump_document

        if isinstance(value, Mapping):
            return dump_document(value).rstrip("\n")
        return "\n".join(_item(dump_document(one)) for one in value) or "[]"
    return fields(value) if isinstance(value, Mapping) else table(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys under each other, headed by the keys."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = [[name.upper().replace("_", " ") for name in names]]
    lines += [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def fields(value: Mapping[str, Any]) -> str:
    """One thing, a line for each key; lists of things as tables below their key."""
    width = max((len(key) for key in value), default=0) + 2
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], Mapping):
            lines += ["", key, *("  " + line for line in table(item).splitlines())]
        elif item not in (None, "", [], {}):
            lines.append(f"{key.replace('_', ' '):{width}}{_cell(item)}")
    return "\n".join(lines)


def listed(run: Run) -> dict[str, Any]:
    """A run as ``list`` shows it."""
    return {
        "run": run.id,
        "state": run.state,
        "created": run.created,
        "seconds": seconds(run),
        "queue": run.queue,
        "job": run.job,
    }


def status(run: Run, progress: Mapping[str, Any], trouble: object = None) -> dict[str, Any]:
    """A run as ``status`` shows it.

    Args:
        progress: the latest line of progress of its newest pod; empty if there is none.
        trouble: why its log cannot be read; None if it can.
    """
    word: Mapping[str, Any] = {**progress, **run.word} if run.has_ended or not progress else progress
    known = ("phase", "step", "steps", "loss", "tokens_per_second", "committed", "memory", "message")
    return {
        "run": run.id,
        "state": run.state,
        **{key: word[key] for key in known if word.get(key) not in (None, "")},
        **({"log": str(trouble)} if trouble else {}),
        "reason": run.reason,
        "created": run.created,
        "started": run.started,
        "ended": run.ended,
        "seconds": seconds(run),
        "queue": run.queue,
        "output": run.output,
        "namespace": run.namespace,
        "job": run.job,
        "attempts": [_attempt(attempt) for attempt in run.pods],
    }


def seconds(run: Run) -> int | None:
    """How long it has been active; None before."""
    if not run.started:
        return None
    end = datetime.fromisoformat(run.ended) if run.ended else datetime.now(UTC)
    # Two clocks: the server's may be ahead of ours.
    return max(0, round((end - datetime.fromisoformat(run.started)).total_seconds()))


def progress_line(progress: Mapping[str, Any]) -> str:
    """A line of progress for people: ``train 120/600  loss 1.2345  4,100 tokens/s  committed 100``."""
    figures = {name: value for name, value in progress.items() if isinstance(value, int | float)}
    parts = [str(progress.get("phase", ""))]
    if figures.keys() >= {"step", "steps"} and figures["steps"]:
        parts[0] += f" {figures['step']}/{figures['steps']}"
    if "loss" in figures:
        parts.append(f"loss {figures['loss']:.4f}")
    if figures.get("tokens_per_second"):
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if figures.keys() >= {"bytes", "of"} and figures["of"]:
        parts.append(f"{figures['bytes'] / 1e6:,.0f} of {figures['of'] / 1e6:,.0f} MB")
    if progress.get("committed"):
        parts.append(f"committed {progress['committed']}")
    return "  ".join(parts)


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "pod": attempt.pod,
        "phase": attempt.phase,
        "code": attempt.code,
        "reason": attempt.reason or str((attempt.state.get("waiting") or {}).get("reason") or ""),
        "node": attempt.node,
        "message": str(attempt.word.get("message") or ""),
    }


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _item(text: str) -> str:
    first, *rest = text.rstrip("\n").splitlines()
    return "\n".join([f"- {first}", *(f"  {line}" for line in rest)])
