"""What became of the data, in words and numbers; and what is too little to train on. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from job.data.row_writer import TOO_LONG, Counts, Limits
from job.data.rows import BadRows
from job.errors import DataInvalid
from job.spec import JobSpec
from job.spec_sections import Data

_ADVICE = "raise training.max_length, choose another training.long_rows, or raise data.max_dropped"


def check_enough(train: Counts, evaluation: Counts, limits: Limits, data: Data, bad: BadRows) -> None:
    """Refuses data of which too much was dropped or nothing is left to train on.

    Raises:
        DataInvalid: with the numbers, and what to try.
    """
    # Rows set aside are rows of data.train; those of data.eval must not make up for them, nor the other way round.
    own = data.eval is not None
    _check_dropped("data.train", [train] if own else [train, evaluation], limits, data.max_dropped)
    if own:
        _check_dropped("data.eval", [evaluation], limits, data.max_dropped)
    if train.kept:
        return
    if evaluation.kept and not own and not (train.dropped + evaluation.dropped).total():
        raise DataInvalid(
            f"data.train: all {evaluation.kept} rows were set aside for evaluation and none is left to train on; "
            "add rows, name evaluation data (data.eval), or set data.eval_split to 0"
        )
    why = [_dropped([train], limits)] if train.dropped else []
    why += [f"bad rows: {bad.kinds.total()}, the first: {bad.examples[0]}"] if bad.examples else []
    why += [f"{evaluation.kept} set aside for evaluation"] if evaluation.kept and not own else []
    advice = _ADVICE if train.dropped else "correct them, or name other data"
    raise DataInvalid(f"data.train: no row is left to train on ({'; '.join(why)}); {advice}")


def _check_dropped(key: str, sets: Sequence[Counts], limits: Limits, max_dropped: float) -> None:
    read, dropped = (sum(counts) for counts in zip(*((one.read, one.dropped.total()) for one in sets), strict=True))
    if dropped > max_dropped * read:
        raise DataInvalid(
            f"{key}: {dropped} of {read} rows dropped ({_dropped(sets, limits)}), over data.max_dropped "
            f"{max_dropped:g}; {_ADVICE}"
        )


def _dropped(sets: Sequence[Counts], limits: Limits) -> str:
    """Rows dropped, by reason."""
    reasons = sum((one.dropped for one in sets), Counter[str]())
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if reasons[TOO_LONG]:
        why += f" {limits.max_length} tokens (the longest has {max(one.longest for one in sets)})"
    return why


def not_used(name: str, columns: Sequence[str]) -> str:
    """A warning of columns that no part of a row is read from."""
    shown = ", ".join(repr(column[:60]) for column in columns[:8])
    return f"{name}: not used: {shown}{' …' if len(columns) > 8 else ''}"


def no_evaluation(spec: JobSpec, counts: Counts, split_from: int) -> str | None:
    """Why there is nothing to evaluate on, as a sentence; None if there is something."""
    data = spec.data
    if counts.kept:
        return None
    if counts.read:
        return f"all {counts.read} evaluation rows were dropped ({', '.join(counts.dropped)})"
    if data.eval is not None:
        return f"{data.eval} has no usable row"
    if not data.eval_split:
        return "neither data.eval nor data.eval_split names evaluation data"
    return (
        f"eval_split {data.eval_split:g} of {split_from} rows sets none aside; the base and the tuned model are not "
        "compared (raise it, or name data.eval)"
    )


def sources_of(train: Counts, spec: JobSpec) -> list[dict[str, Any]]:
    """What each entry of ``data.train`` gives: rows, tokens, and the rows of an epoch by its weight.

    In their order and not by name: a file may stand there twice.
    """
    return [
        {
            "from": source.source,
            "rows": train.source_rows[index],
            "tokens": train.source_tokens[index],
            "weight": source.weight,
            "rows_per_epoch": round(source.weight * train.source_rows[index]),
        }
        for index, source in enumerate(spec.data.train)
    ]


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """A few lines of the report for the log."""
    shapes, sources = report["files"], report["sources"]
    names = {source["from"] for source in sources}
    lines = [
        _file_line(source["from"], shapes[source["from"]], source) for source in sources if source["from"] in shapes
    ]
    lines += [_file_line(name, shape, None) for name, shape in shapes.items() if name not in names]
    for name, words in (("train", "training"), ("eval", "evaluation")):
        if report[name] is not None:
            lines += _set_lines(words, report[name])
    if report["no_eval"] is not None:
        lines.append(f"no evaluation: {report['no_eval']}")
    if report["bad_rows"]:
        bad = ", ".join(f"{count} {kind}" for kind, count in report["bad_rows"].items())
        lines.append(f"bad rows skipped: {bad}; the first: {report['bad_examples'][0]}")
    return [*lines, *(f"warning: {warning}" for warning in report["warnings"])]


def _file_line(name: str, shape: str, source: Mapping[str, Any] | None) -> str:
    if source is None:
        return f"{name}: {shape}"
    weighted = f", weight {source['weight']:g}: {source['rows_per_epoch']:,} an epoch" if source["weight"] != 1 else ""
    return f"{name}: {shape}, {source['rows']:,} training rows{weighted}"


def _set_lines(words: str, counts: Mapping[str, Any]) -> list[str]:
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in counts["dropped"].items())
    cut = "".join(f", {count} cut ({reason})" for reason, count in counts["cut_by"].items())
    same = "".join(
        f", {counts[key]:,} {what}"
        for key, what in (("duplicates", "duplicates"), ("also_in_train", "also in the training data"))
        if counts.get(key)
    )
    lost = f", {counts['lost_tokens']:,} more lost in rows dropped or cut" if counts["lost_tokens"] else ""
    length = counts["length"]
    lengths = ", ".join(f"{rows:,} up to {bound:,}" for bound, rows in counts["histogram"])
    return [
        f"{words} rows: {counts['kept']:,} of {counts['read']:,}{dropped}{cut}{same}",
        f"{words} tokens: {counts['tokens']:,}, {counts['supervised']:,} of them trained{lost}; a row has "
        f"{length['p50']:,} at the median, {length['p99']:,} at the 99th percentile, {length['max']:,} at most",
        f"{words} rows by tokens: {lengths}",
    ]
