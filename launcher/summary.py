"""The text that closes a run: base against tuned, what it cost, and how to load the adapter. Pure."""

import textwrap
from collections.abc import Iterable

from job.loading import loading_code
from launcher.figures import measured
from launcher.results import Results

MIB = 1 << 20


def summary(results: Results) -> str:
    """Several lines: figures, held-out rows, time, memory, verification, and the Python lines that load the adapter."""
    facts = {
        "held out": held_out(results),
        "published": published(results),
        "time": spent(results),
        "memory": memory(results),
        "checked": verified(results),
    }
    return "\n".join(
        [
            f"{results.name}: finished",
            "",
            *figures(results),
            "",
            *(line for title, text in facts.items() if text for line in wrapped(title, text)),
            f"{'adapter':<15} {local_name(results.uri)}",
            "",
            *(
                [f"To fetch it:  tunejob results {results.name} --download {folder(results)}"]
                if is_remote(results)
                else []
            ),
            "To load it:",
            "",
            textwrap.indent(loading(results), "    "),
        ]
    )


def wrapped(title: str, text: str) -> list[str]:
    """A fact under its title, in lines of at most 100 characters."""
    indent = " " * 16
    return textwrap.wrap(
        text,
        100,
        initial_indent=f"{title:<16}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def figures(results: Results) -> list[str]:
    """The table of base against tuned; one line with the reason where nothing was measured."""
    if reason := results["evaluation.skipped"]:
        return [f"not evaluated: {reason}"]
    lines = []
    for figure in measured(results):
        pair = [figure.of(results, side) for side in ("base", "tuned")]
        cells = ("-" if number is None else figure.written(number) for number in pair)
        line = f"{figure.title:<15} " + " ".join(f"{cell:>10}" for cell in cells)
        lines.append(f"{line}   {figure.difference(results)}".rstrip())
    if not lines:
        return ["not evaluated"]
    head = f"{'':<15} {'base':>10} {'tuned':>10}"
    return [f"{head}   difference [95 %]" if isinstance(results["evaluation.difference"], dict) else head, *lines]


def held_out(results: Results) -> str:
    """How many rows the figures stand on, and whether any of them was trained on."""
    rows, overlap = results.figure("evaluation.rows"), results.figure("data.eval.also_in_train")
    if rows is None:
        return ""
    parts = [f"{rows:,.0f} rows"]
    if overlap is not None:
        parts.append(f"{f'{overlap:,.0f}' if overlap else 'none'} of them in the training data")
    answered = results.figure("evaluation.generated_rows")
    if answered and answered < rows:
        parts.append(f"{answered:,.0f} answered")
    return ", ".join(parts)


def published(results: Results) -> str:
    """Which step's state it is, where it is not simply that of the last step planned."""
    steps, planned, step, loss = (
        results.figure(f"evaluation.{path}")
        for path in ("steps", "stopped_early.planned_steps", "published_step", "best.loss")
    )
    parts = [] if step is None else [f"step {step:,.0f}"]
    if loss is not None and step == results.figure("evaluation.best.step") and step != steps:
        parts.append(f"of the lowest evaluation loss ({loss:.4f})")
    if planned is not None and steps is not None:
        parts.append(f"stopped early at step {steps:,.0f} of {planned:,.0f}")
    return ", ".join(parts) if len(parts) > 1 else ""


def spent(results: Results) -> str:
    """Seconds of each phase, and of the whole."""
    phases = results["performance.phases"]
    names = phases if isinstance(phases, dict) else {}
    timed = {name: results.figure(f"performance.phases.{name}") for name in names}
    parts = [f"{name} {duration(seconds)}" for name, seconds in timed.items() if seconds is not None]
    whole = results.figure("performance.seconds")
    return ": ".join(filter(None, ["" if whole is None else f"{duration(whole)} in all", ", ".join(parts)]))


def memory(results: Results) -> str:
    """The highest point of memory, and of what."""
    peak = results.peak_memory
    if peak is None:
        return ""
    device = results["performance.device"]
    return f"{mebibytes(peak)} at most" + (f" ({device})" if device else "")


def verified(results: Results) -> str:
    """What a fresh process found when it loaded the adapter with stock PEFT."""
    match results["verification.level"]:
        case "logits":
            difference = results.figure("verification.max_abs_difference")
            extent = "" if difference is None else f" (largest difference {difference:.1g})"
            return f"loaded by a fresh process: the same logits{extent}"
        case "structural":
            return "loaded by a fresh process: keys, shapes and hashes are right; logits were not compared"
    return ""


def loading(results: Results) -> str:
    """Python that loads base and adapter."""
    model = str(results["model"] or "BASE MODEL")
    return loading_code(model, folder(results), results["method"] == "qlora", bool(results["new_tokens"]))


def is_remote(results: Results) -> bool:
    """Whether the run's folder is in a store that Python cannot open by itself."""
    return "://" in local_name(results.uri)


def folder(results: Results) -> str:
    """Where the adapter is on this machine, or may be fetched to."""
    return results.name if is_remote(results) else local_name(results.uri)


def local_name(uri: str) -> str:
    """A folder of this machine as Python and the shell want it: without ``file:``."""
    return uri.removeprefix("file://").removeprefix("file:").removeprefix("./").rstrip("/") or uri


def mebibytes(count: float) -> str:
    """Bytes, in MiB."""
    return f"{count / MIB:,.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``3 min 05 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def rows_of(lines: Iterable[Iterable[str]]) -> list[str]:
    """Markdown table rows."""
    return [f"| {' | '.join(cells)} |" for cells in lines]
