"""The figures of an evaluation as people read them: how each is written, and how sure a difference is. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.results import Results


@dataclass(frozen=True)
class Figure:
    """One figure of base and tuned."""

    key: str
    """In the record: ``evaluation.base.KEY``, ``evaluation.tuned.KEY`` and ``evaluation.difference.KEY``."""
    title: str
    form: str
    """How it is written; a share as per cent."""

    def written(self, number: float) -> str:
        """The figure."""
        return format(number, self.form)

    def of(self, results: Results, side: str) -> float | None:
        """What ``base`` or ``tuned`` scored."""
        return results.figure(f"evaluation.{side}.{self.key}")

    def difference(self, results: Results) -> str:
        """Tuned less base with its 95 % interval: ``-3.1250 [-3.3000, -2.9500]``; why there is none, if it says so.

        That of a share is in percentage points.
        """
        value, low, high = (
            results.figure(f"evaluation.difference.{self.key}.{part}") for part in ("value", "low", "high")
        )
        if value is None:
            return str(results[f"evaluation.difference.{self.key}.reason"] or "")
        interval = "" if low is None or high is None else f" [{self._signed(low)}, {self._signed(high)}]"
        return self._signed(value) + interval

    def _signed(self, number: float) -> str:
        if self.form.endswith("%"):
            return format(100 * number, f"+{self.form[:-1]}f")
        return format(number, f"+{self.form}")


FIGURES = (
    Figure("loss", "loss", ".4f"),
    Figure("perplexity", "perplexity", ".3f"),
    Figure("token_accuracy", "token accuracy", ".1%"),
    Figure("exact_match", "exact match", ".1%"),
    Figure("extracted_match", "extracted", ".1%"),
    Figure("chrf", "chrF", ".1f"),
    Figure("rouge_l", "ROUGE-L", ".3f"),
)


def measured(*runs: Results) -> Iterator[Figure]:
    """Those that at least one of the runs has, of base or tuned, or says why it has not."""
    for figure in FIGURES:
        if any(
            figure.difference(run) or figure.of(run, side) is not None for run in runs for side in ("base", "tuned")
        ):
            yield figure
