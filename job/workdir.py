"""The work directory: the only channel between the supervisor, ``prepare`` and the worker.

The supervisor pulls into it and pushes out of it; the others know nothing else. Every file here appears whole
(``job.files``), so that a reader never sees half of one.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkDir:
    """Where each thing lies in one attempt's work directory."""

    root: Path

    # from the supervisor
    @property
    def spec(self) -> Path:
        """The resolved spec (YAML)."""
        return self.root / "spec.yaml"

    @property
    def inputs(self) -> Path:
        """JSON: where the pulled inputs lie. See ``job.inputs.Inputs``."""
        return self.root / "inputs.json"

    @property
    def outgoing(self) -> Path:
        """Copies of files that still grow, while they are sent."""
        return self.root / "outgoing"

    @property
    def resume(self) -> Path:
        """A verified checkpoint to go on from; absent for a fresh start."""
        return self.root / "resume"

    @property
    def stop(self) -> Path:
        """Its existence asks the worker to seal a checkpoint and leave."""
        return self.root / "stop"

    # from prepare
    @property
    def prepared(self) -> Path:
        """Folder of tokenised rows; see ``job.data.prepare``."""
        return self.root / "prepared"

    @property
    def data_report(self) -> Path:
        """JSON: what was kept, cut and dropped."""
        return self.prepared / "report.json"

    # from the worker
    @property
    def checkpoints(self) -> Path:
        """Sealed checkpoints, one folder each, named by ``job.layout.checkpoint_name``."""
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        """The adapter of the lowest evaluation loss so far, where that is to be published."""
        return self.root / "best"

    @property
    def adapter(self) -> Path:
        """The sealed adapter and tokenizer, as they will be published."""
        return self.root / "adapter"

    @property
    def progress(self) -> Path:
        """JSON: the worker's latest word: phase, step, steps, loss, learning_rate, tokens_per_second."""
        return self.root / "progress.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """JSON: base and tuned figures."""
        return self.root / "evaluation.json"

    @property
    def performance(self) -> Path:
        """JSON: the worker's memory and throughput."""
        return self.root / "performance.json"

    @property
    def probe(self) -> Path:
        """safetensors: a few rows and the tuned model's logits on them, for ``verify``."""
        return self.root / "probe.safetensors"

    @property
    def verification(self) -> Path:
        """JSON: what the fresh process found."""
        return self.root / "verification.json"

    def outcome(self, process: str) -> Path:
        """JSON {exit_code, message}: how ``prepare``, ``rank-N`` or ``verify`` ended. Absent if it just vanished."""
        return self.root / "outcomes" / f"{process}.json"

    def pid(self, process: str) -> Path:
        """The process number of `rank-N`, in decimal."""
        return self.root / "outcomes" / f"{process}.pid"

    # from the supervisor, for the store
    @property
    def log(self) -> Path:
        """The human log of all attempts."""
        return self.root / "training_log.txt"

    @property
    def results(self) -> Path:
        """JSON: everything measured, as published."""
        return self.root / "eval_results.json"

    @property
    def card(self) -> Path:
        """The model card, as published."""
        return self.root / "README.md"

    @property
    def caches(self) -> Path:
        """Where libraries of the children may keep what they like."""
        return self.root / "caches"
