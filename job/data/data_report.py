"""What became of the data, in words and numbers; and what is too little to train on. Pure."""

from collections.abc import Mapping
from typing import Any

from job.data.row_writer import TOO_LONG, Counts, Limits
from job.errors import DataInvalid
from job.spec import JobSpec


def check_enough(train: Counts, evaluation: Counts, limits: Limits, max_dropped: float) -> None:
    """Refuses data of which too much was dropped or nothing is left to train on.

    Raises:
        DataInvalid: with the numbers, and what to try.
    """
    read = train.read + evaluation.read
    dropped = train.dropped.total() + evaluation.dropped.total()
    why = ", ".join(f"{count} {reason}" for reason, count in (train.dropped + evaluation.dropped).items())
    if (train.dropped + evaluation.dropped)[TOO_LONG]:
        why += f" {limits.max_length} tokens (the longest has {max(train.longest, evaluation.longest)})"
    advice = "raise training.max_length, choose another training.long_rows, or raise data.max_dropped"
    if dropped > max_dropped * read:
        raise DataInvalid(
            f"data.train: {dropped} of {read} rows dropped ({why}), over data.max_dropped {max_dropped:g}; {advice}"
        )
    if not train.kept and evaluation.kept and not dropped:
        raise DataInvalid(
            f"data.train: all {evaluation.kept} rows were set aside for evaluation and none is left to train on; "
            "add rows, name evaluation data (data.eval), or set data.eval_split to 0"
        )
    if not train.kept:
        aside = f", {evaluation.kept} set aside for evaluation" if evaluation.kept else ""
        raise DataInvalid(f"data.train: no row is left to train on ({why or 'none could be read'}{aside}); {advice}")


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
