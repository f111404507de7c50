"""Beside TRL's SFTTrainer: the same rows, masks, order and first adapter give the same course (make test-others)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from job.evaluation.evaluate import measure
from job.training.head import chunked_head
from job.training.kernels import PaddingFree
from job.training.loop import Loop, make_optimizer
from job.training.order import Order
from tests.job.made import CPU, made_model, made_rows, made_spec

pytestmark = pytest.mark.others

STEPS, BATCH = 50, 8
SPEC = made_spec(training={"max_steps": STEPS, "batch_size": BATCH, "micro_batch_size": 4, "learning_rate": 2e-3})


def rows_and_order() -> tuple[Any, Order]:
    lengths = [7 + (13 * row) % 50 for row in range(96)]
    rows = made_rows(lengths, 300, prompt=4)
    return rows, Order(rows.sources, [1.0], SPEC.training, "digest")


def our_losses(folder: Path) -> list[float]:
    rows, order = rows_and_order()
    model = made_model(folder, SPEC)
    kernel = PaddingFree(CPU.device, chunked_head(model.get_base_model()))
    loop = Loop(model, make_optimizer(model, SPEC.training), rows, order, SPEC.training, kernel, CPU)
    return [progress.loss for progress in loop.run(lambda: False)]


def their_losses(folder: Path, tmp_path: Path, accumulation: int) -> list[float]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows, order = rows_and_order()
    met = [int(row) for step in range(STEPS) for row in order.rows(step)]
    data = Dataset.from_dict(
        {"input_ids": [rows.tokens(row).tolist() for row in met], "labels": [rows.labels(row).tolist() for row in met]}
    )
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=SPEC.training.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    model = made_model(folder, SPEC)
    trainer = InOrder(
        model=model, args=settings, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen"])
def test_fifty_steps_follow_the_same_course(
    kind: str, accumulation: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    ours, theirs = our_losses(folder), their_losses(folder, tmp_path, accumulation)
    assert len(ours) == len(theirs) == STEPS
    assert ours[0] - ours[-1] > 0.05, "nothing was learned, so nothing was compared"
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{kind}, accumulation {accumulation}: largest difference of the loss {worst:.1e}")
    assert worst <= 1e-4


def test_trl_trains_the_line_break_after_the_end_of_turn_and_we_do_not(tiny_llama: Path, tmp_path: Path) -> None:
    """Where masks differ by design: nobody generates past the end of a turn."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from job.data import chat
    from job.data.encode import Encoder
    from job.data.formats import Conversation

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    question, answer = "What colour is the lime?", "green"
    template = chat.choose(None, tokenizer)
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    rendered = chat.render(Conversation(turns), template)
    (ours,) = Encoder(tokenizer, "assistant").encode([(rendered, False)])
    data = Dataset.from_list([{"prompt": [turns[0]], "completion": [turns[1]]}])
    settings = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(
        model=made_model(tiny_llama, SPEC), args=settings, train_dataset=data, processing_class=tokenizer
    )
    (theirs,) = list(trainer.train_dataset)
    assert list(ours.tokens) == theirs["input_ids"]
    ours_trained = [token for token, bit in zip(ours.tokens, ours.trained, strict=True) if bit]
    theirs_trained = [label for label in theirs["labels"] if label != -100]
    assert tokenizer.decode(ours_trained) == f"{answer}<|im_end|>"
    assert tokenizer.decode(theirs_trained) == f"{answer}<|im_end|>\n"


def test_their_evaluation_loss_depends_on_the_batch_size_and_ours_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    """T5: where normalisation differs by design. A mean of batches' means weighs a token by who stands beside it."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = tiny_llama
    # Rows with few and with many trained tokens.
    rows = made_rows([6, 60] * 6, 300, prompt=4)
    tokens = [rows.tokens(row).tolist() for row in range(len(rows))]
    data = Dataset.from_dict({"input_ids": tokens, "labels": [rows.labels(row).tolist() for row in range(len(rows))]})

    def theirs(size: int) -> float:
        settings = SFTConfig(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=size,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = made_model(folder, SPEC)
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )
        return float(trainer.evaluate()["eval_loss"])

    def ours(budget: int) -> float:
        core = made_model(folder, SPEC).get_base_model()
        return measure(core, rows, PaddingFree(CPU.device, chunked_head(core)), CPU, budget).loss

    their_losses_by_size = [theirs(size) for size in (1, 12)]
    our_losses_by_budget = [ours(budget) for budget in (64, 1024)]
    assert abs(our_losses_by_budget[0] - our_losses_by_budget[1]) <= 1e-6
    assert abs(their_losses_by_size[0] - their_losses_by_size[1]) > 1e-4
    # All rows in one batch is the case in which both count alike.
    assert abs(their_losses_by_size[1] - our_losses_by_budget[0]) <= 1e-5
