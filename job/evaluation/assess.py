"""The evaluations of a run: on the way, keeping the best state and stopping early; base against tuned at the end."""

import logging
import shutil
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from job.data.prepared import Rows
from job.errors import DataInvalid, IntegrityFailure, InternalError, SpecInvalid
from job.evaluation import evaluate, generate, metrics
from job.evaluation.figures import OF_ANSWERS, OF_TOKENS, Array, differences, figures, finite
from job.files import sealing, write_json
from job.layout import CHECKPOINT_STATE
from job.training.adapter import load_adapter, save_adapter
from job.training.checkpoint import BEST, OPTIMIZER
from job.training.course import Course
from job.training.loop import Loop
from job.training.sharded import is_shared
from job.training.worker import Worker

log = logging.getLogger(__name__)

PROBE_ROWS = 4
PROBE_TOKENS = 64


def require(worker: Worker) -> None:
    """Sees, before the base is loaded, that what the spec wants of evaluations can be had.

    Raises:
        DataInvalid: the best state is to be found, or the training to be stopped, by rows that are not there.
        SpecInvalid: ``evaluation.extract`` finds nothing in any answer of the rows themselves.
    """
    settings, rows = worker.spec.evaluation, worker.data.eval
    if rows is None:
        for key, wanted in (("publish: best", settings.publish == "best"), ("early_stopping", settings.early_stopping)):
            if wanted:
                raise DataInvalid(
                    f"evaluation.{key}: needs evaluation rows, and there are none ({worker.data.info['no_eval']}); "
                    "name data.eval or raise data.eval_split"
                )
        return
    count = min(settings.generate_rows, len(rows))
    if settings.extract is None or not count:
        return
    absent = [row for row in range(count) if metrics.extracted(rows.answer(row).strip(), settings.extract) is None]
    if len(absent) == count:
        raise SpecInvalid(
            f"evaluation.extract: {settings.extract!r} finds nothing in any of the {count} answers it is for, "
            f"the first being {rows.origin(0)}; change the expression"
        )
    if absent and worker.is_first:
        log.warning(
            "evaluation.extract finds nothing in %d of %d answers, first %s: they count as wrong",
            len(absent),
            count,
            rows.origin(absent[0]),
        )


# On the way


def on_the_way(worker: Worker, loop: Loop, last: bool) -> bool:
    """Evaluates where the spec asks for it at this step, and keeps the adapter if it is the best so far.

    Returns:
        Whether a stop was asked for; then nothing was evaluated, and the attempt that resumes here makes up for it.
    """
    if not _is_due(worker, loop.progress.step, last) or loop.progress.stop_asked:
        return loop.progress.stop_asked
    try:
        loss = _measured(worker, loop, worker.stop_asked).loss
    except evaluate.StopAsked:
        return True
    step = loop.progress.step
    is_best = worker.course.note(step, loss, worker.spec.evaluation.min_improvement)
    log.info("step %d: evaluation loss %.4f%s", step, loss, ", the best so far" if is_best else "")
    worker.note({"step": step, "eval_loss": loss})
    if is_best and worker.spec.evaluation.publish == "best":
        _keep_best(worker, loop.model)
    return False


def _is_due(worker: Worker, step: int, last: bool) -> bool:
    """The last step is evaluated at the end anyway, unless it has to be known whether it is the best."""
    settings = worker.spec.evaluation
    if worker.data.eval is None or settings.every_steps is None:
        return False
    return settings.publish == "best" if last else step % settings.every_steps == 0


def catch_up(worker: Worker, loop: Loop) -> bool:
    """Makes up for the evaluation that the request to leave cut off at the step resumed from.

    Returns:
        Whether it was cut off again.
    """
    step = loop.progress.step
    if not step or worker.course.step == step:
        return False
    return on_the_way(worker, loop, last=step == loop.order.steps)


def is_owed(worker: Worker) -> bool:
    """Whether the last step is not evaluated yet, and has to be before it is known which state is the best."""
    step = int(worker.position["step"])
    return _is_due(worker, step, last=True) and worker.course.step != step


def is_over(worker: Worker) -> bool:
    """Whether the training ends here because evaluations bring nothing any more."""
    return worker.course.is_over(worker.spec.evaluation.early_stopping)


def _keep_best(worker: Worker, model: PeftModel) -> None:
    if worker.is_first:
        with sealing(worker.workdir.best) as scratch:
            save_adapter(model, scratch, "safetensors")
    worker.barrier()


def resume_best(worker: Worker, step: int) -> None:
    """Brings the best adapter so far out of the checkpoint that is resumed.

    Raises:
        IntegrityFailure: the checkpoint speaks of one and has none.
    """
    course, resume = worker.course, worker.workdir.resume
    if worker.spec.evaluation.publish == "best" and course.best_step and worker.is_first:
        source = resume if course.best_step == step else resume / BEST
        if not source.exists():
            raise IntegrityFailure(f"{resume.name}: the best adapter, of step {course.best_step}, is missing in it")
        with sealing(worker.workdir.best) as scratch:
            ignored = shutil.ignore_patterns(OPTIMIZER, CHECKPOINT_STATE, BEST)
            shutil.copytree(source, scratch, dirs_exist_ok=True, ignore=ignored)
    worker.barrier()


def choose(worker: Worker, loop: Loop) -> None:
    """Gives the model the state that is published: the last, or the best."""
    worker.published_step = loop.progress.step
    course = worker.course
    if worker.spec.evaluation.publish == "last" or course.best_step == loop.progress.step:
        return
    if not course.best_step:
        log.warning("no evaluation loss was finite: the last step is published")
        return
    load_adapter(loop.model, worker.workdir.best)
    worker.published_step = course.best_step
    log.info("publishing step %d, of the lowest evaluation loss %.4f", course.best_step, course.best_loss)


# At the end


def compare(worker: Worker, loop: Loop, base_biases: dict[str, torch.Tensor]) -> None:
    """Base against tuned on the same rows, and a probe for the fresh process that verifies the adapter."""
    _write_probe(worker, loop.model)
    record = _of_the_training(worker, loop)
    if worker.data.eval is None:
        write_json(worker.workdir.evaluation, {"skipped": worker.data.info["no_eval"]} | record)
        return
    worker.tell(phase="evaluate", what="tuned")
    tuned = _both(worker, loop, worker.data.eval)
    worker.tell(phase="evaluate", what="base")
    with evaluate.as_base(loop.model, base_biases):
        base = _both(worker, loop, worker.data.eval)
    if worker.is_first:
        write_json(worker.workdir.evaluation, record | _side_by_side(worker, base, tuned))


def _of_the_training(worker: Worker, loop: Loop) -> dict[str, Any]:
    """Where it ended, what of it is published, and what the evaluations on the way found."""
    course: Course = worker.course
    stopped = loop.progress.step < loop.order.steps
    return {
        "steps": loop.progress.step,
        "stopped_early": {"planned_steps": loop.order.steps, "evaluations": course.since} if stopped else None,
        "published_step": worker.published_step,
        "best": {"step": course.best_step, "loss": course.best_loss} if course.best_step else None,
    }


def _both(worker: Worker, loop: Loop, rows: Rows) -> tuple[Array, Array | None]:
    """Sums of each row for one model: of its tokens, and of its generated answers if there are any."""
    sums, settings = _measured(worker, loop).sums, worker.spec.evaluation
    count = min(settings.generate_rows, len(rows))
    if not count:
        return sums, None
    ends = [int(token) for token in worker.data.info["end_ids"]]
    said = generate.answers(
        loop.model.get_base_model(),
        rows,
        worker.tokenizer(),
        ends,
        worker.placement,
        count,
        settings.max_new_tokens,
        loop.budget,
        on_batch=worker.pulse,
    )
    found = torch.zeros((count, metrics.COLUMNS), dtype=torch.float64)
    for row, answer in said.items():
        found[row] = torch.tensor(metrics.statistics(answer, rows.answer(row), settings.extract))
    return sums, evaluate.over_ranks(found.to(worker.placement.device), worker.placement)


def _side_by_side(
    worker: Worker, base: tuple[Array, Array | None], tuned: tuple[Array, Array | None]
) -> dict[str, Any]:
    """Figures of both models and their differences, as evaluation.json has them."""
    settings = worker.spec.evaluation
    of_answers = {k: metric for k, metric in OF_ANSWERS.items() if settings.extract or k != "extracted_match"}
    kinds = [(base[0], tuned[0], OF_TOKENS)]
    if base[1] is not None and tuned[1] is not None:
        kinds.append((base[1], tuned[1], of_answers))
    generated = 0 if base[1] is None else len(base[1])
    sides: dict[str, Any] = {"base": {}, "tuned": {}, "difference": {}}
    for before, after, table in kinds:
        both = finite(figures(before, table), figures(after, table))
        sides["base"] |= both[0]
        sides["tuned"] |= both[1]
        sides["difference"] |= differences(before, after, table)
    return {
        "rows": len(base[0]),
        "rows_digest": worker.data.info["eval_digest"],
        "tokens": int(base[0][:, 2].sum()),
        "generated_rows": generated,
        "extract": settings.extract if generated else None,
        **sides,
    }


def _measured(worker: Worker, loop: Loop, should_stop: Callable[[], bool] | None = None) -> evaluate.Figures:
    rows = worker.data.eval
    if rows is None:
        raise InternalError("evaluation without rows")
    budget = loop.budget
    core = loop.model.get_base_model()
    limit = worker.spec.evaluation.max_rows
    return evaluate.measure(core, rows, loop.kernel, worker.placement, budget, limit, should_stop, worker.pulse)


@torch.no_grad()
def _write_probe(worker: Worker, model: PeftModel) -> None:
    """A few rows and the tuned model's logits on them, float32 ``[tokens, vocabulary]``."""
    core, tensors = model.get_base_model(), {}
    if not worker.is_first and not is_shared(core):
        return  # a shared base computes only where every rank takes part
    rows = worker.data.eval or worker.data.train
    core.eval()
    for row in range(min(PROBE_ROWS, len(rows))):
        tokens = torch.from_numpy(rows.tokens(row)[:PROBE_TOKENS].astype("int64"))[None]
        with worker.placement.autocast():
            logits = core(input_ids=tokens.to(worker.placement.device), use_cache=False).logits
        tensors[f"tokens.{row}"] = tokens[0]
        tensors[f"logits.{row}"] = logits[0].float().cpu().contiguous()
    if worker.is_first:
        save_file(tensors, worker.workdir.probe)
