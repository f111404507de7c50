"""One arm of ``make bench-train`` in a process of its own: ``python -m tests.bench.train_arms ARM TASK.json``.

Prints one JSON line. CPU seconds are user and system time of the whole process, between the end of the warm-up step and
the end of the last, so that imports, loading and first allocations do not count; memory is the process's peak.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.train_data import MODEL, Task

LEARNING_RATE = 2e-4


@dataclass
class Measured:
    """What an arm took and what it computed."""

    cpu_seconds: float = 0.0
    useful: int = 0
    """Tokens, padding not counted."""
    losses: list[float] = field(default_factory=list)
    """Mean cross entropy of each step's trained tokens, the warm-up's included; of an evaluation its one loss."""
    peak_mib: float = 0.0
    note: str = ""

    @property
    def rate(self) -> float:
        """Useful tokens per CPU-second."""
        return self.useful / self.cpu_seconds


@dataclass
class Clock:
    """CPU time between two calls of ``tick``: the first and the last."""

    profile: bool = False
    times: list[float] = field(default_factory=list)
    profiler: Any = None

    def tick(self) -> None:
        """After each step."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.times.append(usage.ru_utime + usage.ru_stime)
        if self.profile and self.profiler is None:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.__enter__()

    def seconds(self) -> float:
        """Without the first step."""
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            table = self.profiler.key_averages()
            print(table.table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=44), file=sys.stderr)
        return self.times[-1] - self.times[0]


def spec_of(task: Task, dropout: float = 0.0) -> Any:
    """The run as our spec says it: LoRA of rank 16 on all linear layers, float32."""
    from job.spec import JobSpec

    training = {
        "batch_size": task.batch,
        "micro_batch_size": max(1, task.budget // task.max_length),
        "max_length": task.max_length,
        "max_steps": 2,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "gradient_checkpointing": False,
    }
    lora = {"r": 16, "alpha": 32, "dropout": dropout}
    data = {"train": "rows.jsonl"}
    return JobSpec.model_validate({"name": "bench", "model": "small", "data": data, "lora": lora, "training": training})


def adapted(task: Task) -> Any:
    """The small model with the adapter every arm begins with."""
    from job.training.adapter import add_adapter
    from job.training.model import load_base
    from tests.job.made import CPU

    spec = spec_of(task)
    return add_adapter(load_base(MODEL, spec, CPU), spec, CPU)


class FixedOrder:
    """Both steps' rows, in order."""

    steps = steps_per_epoch = 2

    def __init__(self, task: Task) -> None:
        self._batch = task.batch

    def rows(self, step: int) -> Any:
        return np.arange(step * self._batch, (step + 1) * self._batch)


def _rows(tokens: list[list[int]], labels: list[list[int]]) -> Any:
    from tests.job.made import rows_of

    arrays = [np.array(row, dtype=np.int32) for row in tokens]
    return rows_of(arrays, [[label != -100 for label in row] for row in labels])


def _kernel(core: Any, rows: Any, private: bool) -> Any:
    """The kernel that `training.kernels: auto` chooses, with or without private operators."""
    from job.training import kernels
    from job.training.head import chunked_head
    from tests.job.made import CPU

    def public(core: Any, device: torch.device, padding: int) -> Any:
        return kernels.PaddingFree(device, chunked_head(core))

    with contextlib.nullcontext() if private else kernels.registered(public):
        reference = kernels.Reference(0, CPU.device)
        return kernels.choose(core, rows, range(3), reference, CPU).kernel


def ours(task: Task, clock: Clock, private: bool) -> Measured:
    """Our loop."""
    from job.training.loop import Loop, make_optimizer
    from tests.job.made import CPU

    model, spec = adapted(task), spec_of(task)
    rows, order = _rows(task.rows, task.row_labels), FixedOrder(task)
    kernel = _kernel(model.get_base_model(), rows, private)
    loop = Loop(model, make_optimizer(model, spec.training), rows, order, spec.training, kernel, CPU)  # type: ignore
    losses = []
    for progress in loop.run(lambda: False):
        clock.tick()
        losses.append(float(progress.loss))
    return Measured(clock.seconds(), task.useful, losses, note=kernel.name)


def plain(task: Task, clock: Clock) -> Measured:
    """The loop people write on PEFT: padded micro-batches, the model's own loss over full logits."""
    model = adapted(task)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(2):
        rows = range(step * task.batch, (step + 1) * task.batch)
        count = sum(label != -100 for row in rows for label in task.row_labels[row])
        total = 0.0
        for start in rows[:: task.micro_batch]:
            batch = _padded(task, rows[start - rows.start : start - rows.start + task.micro_batch])
            loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        clock.tick()
    return Measured(clock.seconds(), task.useful, losses)


def _padded(task: Task, rows: range) -> dict[str, torch.Tensor]:
    longest = max(len(task.rows[row]) for row in rows)

    def fill(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[*lists[row], *[value] * (longest - len(lists[row]))] for row in rows])

    ones = [[1] * len(row) for row in task.rows]
    return {"input_ids": fill(task.rows, 0), "attention_mask": fill(ones, 0), "labels": fill(task.row_labels, -100)}


def trl(task: Task, clock: Clock, **settings: Any) -> Measured:
    """TRL's trainer on the same rows and labels; ``settings`` are those of SFTConfig."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    columns: dict[str, Any] = {"input_ids": task.rows, "labels": task.row_labels}
    device_batch = settings.pop("per_device_train_batch_size", 8)
    steps_rows = task.batch
    if settings.pop("packed", False):
        columns = _packed(task)
        steps_rows = len(columns["input_ids"]) // 2
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            **settings,
            per_device_train_batch_size=device_batch,
            gradient_accumulation_steps=steps_rows // device_batch,
            max_steps=2,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = InOrder(
            model=adapted(task),
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=AutoTokenizer.from_pretrained(MODEL),
            callbacks=[Ticking()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Measured(clock.seconds(), task.useful, losses)


def _packed(task: Task) -> dict[str, Any]:
    """What TRL's packing would make of each step by itself: rows put together up to its default length."""
    from job.training.order import micro_batches

    bins = micro_batches([len(row) for row in task.tokens], 1024, padded=False)
    warm_up = [list(range(number, task.batch, len(bins))) for number in range(len(bins))]
    groups = [*warm_up, *[[task.batch + row for row in part] for part in bins]]
    joined = lambda lists: [[value for row in part for value in lists[row]] for part in groups]  # noqa: E731
    lengths = [[len(task.rows[row]) for row in part] for part in groups]
    return {"input_ids": joined(task.rows), "labels": joined(task.row_labels), "seq_lengths": lengths}


@contextlib.contextmanager
def _timed(clock: Clock) -> Iterator[None]:
    clock.tick()
    yield
    clock.tick()


def eval_ours(task: Task, clock: Clock, private: bool) -> Measured:
    """Our evaluation pass."""
    from job.evaluation.evaluate import measure
    from tests.job.made import CPU

    core = adapted(task).get_base_model()
    warm_up, held_out = (_rows(getattr(task, part), task.labels[part]) for part in ("warm_up", "held_out"))
    kernel = _kernel(core, warm_up, private)
    measure(core, warm_up, kernel, CPU, task.budget)
    with _timed(clock):
        figures = measure(core, held_out, kernel, CPU, task.budget)
    return Measured(clock.seconds(), sum(map(len, task.held_out)), [figures.loss], note=kernel.name)


def eval_trainer(task: Task, clock: Clock) -> Measured:
    """Hugging Face's Trainer at its defaults, told only to compute the loss."""
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def rows(part: str) -> Any:
        tokens = getattr(task, part)
        ones = [[1] * len(row) for row in tokens]
        return Dataset.from_dict({"input_ids": tokens, "attention_mask": ones, "labels": task.labels[part]})

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, prediction_loss_only=True
        )
        collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(MODEL), padding=True)
        trainer = Trainer(model=adapted(task), args=arguments, data_collator=collator)
        trainer.evaluate(rows("warm_up"))
        with _timed(clock):
            found = trainer.evaluate(rows("held_out"))
    return Measured(clock.seconds(), sum(map(len, task.held_out)), [found["eval_loss"]])


_FAST = {"gradient_checkpointing": False, "loss_type": "chunked_nll"}
ARMS: dict[str, Callable[[Task, Clock], Measured]] = {
    "ours": lambda task, clock: ours(task, clock, private=False),
    "ours, oneDNN": lambda task, clock: ours(task, clock, private=True),
    "plain PEFT loop": plain,
    "TRL, defaults": lambda task, clock: trl(task, clock),
    "TRL, padded": lambda task, clock: trl(task, clock, per_device_train_batch_size=task.micro_batch, **_FAST),
    "TRL, padding-free": lambda task, clock: trl(
        task, clock, per_device_train_batch_size=task.micro_batch, padding_free=True, max_length=None, **_FAST
    ),
    "TRL, row by row": lambda task, clock: trl(task, clock, per_device_train_batch_size=1, **_FAST),
    "TRL, packing": lambda task, clock: trl(
        task, clock, per_device_train_batch_size=1, packed=True, padding_free=True, max_length=None, **_FAST
    ),
    "evaluation, ours": lambda task, clock: eval_ours(task, clock, private=False),
    "evaluation, ours, oneDNN": lambda task, clock: eval_ours(task, clock, private=True),
    "evaluation, HF Trainer": eval_trainer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("task", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print torch's profile of the measured steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    measured = ARMS[arguments.arm](Task.read(arguments.task), Clock(arguments.profile))
    measured.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("MEASURED " + json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
