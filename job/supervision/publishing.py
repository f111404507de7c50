"""What a run publishes, put together out of what its processes left in the work directory."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from job import layout
from job.files import read_json, write_json
from job.spec import JobSpec, digest
from job.storage import transfer
from job.storage.store import Store
from job.supervision.results import eval_results, model_card
from job.workdir import WorkDir

log = logging.getLogger(__name__)


def publish(
    store: Store,
    workdir: WorkDir,
    spec: JobSpec,
    run: str,
    seconds: Mapping[str, float],
    prove: Callable[[], None],
    tick: Callable[[], None],
    before_seal: Callable[[], None],
) -> transfer.Manifest:
    """The published manifest of a run.

    Args:
        seconds: spent in each phase of the supervisor's.
        prove, tick, before_seal: see ``job.storage.transfer.publish``.
    """
    log.info("publishing to %s", store.uri)
    evaluation = read_json(workdir.evaluation)
    results = eval_results(
        run,
        spec,
        evaluation,
        read_json(workdir.data_report),
        read_json(workdir.verification),
        read_json(workdir.performance),
        seconds,
    )
    write_json(workdir.results, results)
    workdir.card.write_text(model_card(run, spec, results), encoding="utf-8")
    extra = {"run": run, "spec_digest": digest(spec), "published_step": evaluation.get("published_step")}
    return transfer.publish(store, _files(workdir), extra, prove, tick, before_seal)


def _files(workdir: WorkDir) -> dict[str, Path]:
    """By key, everything but the checkpoints and the manifest."""
    workdir.outgoing.mkdir(exist_ok=True)
    log_so_far = workdir.outgoing / layout.TRAINING_LOG  # the log itself still grows
    shutil.copyfile(workdir.log, log_so_far)
    return {path.name: path for path in workdir.adapter.iterdir()} | {
        layout.TRAINING_CONFIG: workdir.spec,
        layout.TRAINING_LOG: log_so_far,
        layout.METRICS: workdir.metrics,
        layout.EVAL_RESULTS: workdir.results,
        layout.MODEL_CARD: workdir.card,
    }
