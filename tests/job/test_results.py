"""What a run found, as its model card tells it."""

from typing import Any

from job.supervision.results import eval_results, model_card
from tests.job.made import made_spec

DIFFERENCE = {"value": -1.5, "standard_error": 0.1, "low": -1.75, "high": -1.25}
EVALUATION: dict[str, Any] = {
    "steps": 9,
    "published_step": 9,
    "stopped_early": None,
    "best": None,
    "rows": 128,
    "generated_rows": 64,
    "extract": "number",
    "base": {"loss": 3.0, "chrf": 12.5},
    "tuned": {"loss": 1.5, "chrf": 50.0},
    "difference": {"loss": DIFFERENCE, "chrf": DIFFERENCE | {"value": 37.5, "low": None, "high": None}},
}


def card(**changes: Any) -> str:
    evaluation = EVALUATION | changes
    performance = {"phases": {"train": 2.0}}
    results = eval_results("made-1", made_spec(), evaluation, {}, {}, performance, {"worker": 3.0})
    return model_card("made-1", made_spec(), results)


def test_the_model_card_shows_every_figure_with_its_difference() -> None:
    lines = card().splitlines()
    assert "128 held-out rows; 64 of them answered by greedy generation, of the answers `number` is compared." in lines
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| | base | tuned | difference | 95 % interval |",
        "|---|---|---|---|---|",
        "| loss (nats per token) | 3.0000 | 1.5000 | -1.5000 | -1.7500 to -1.2500 |",
        "| chrF (0 to 100) | 12.5000 | 50.0000 | +37.5000 | - |",
    ]
    assert "This is the state after step 9 of 9." in lines


def test_the_model_card_says_which_state_it_is_and_whether_the_training_ended_early() -> None:
    early = {"planned_steps": 40, "evaluations": 3}
    text = card(published_step=6, best={"step": 6, "loss": 1.5}, stopped_early=early)
    assert (
        "This is the state after step 6 of 9, the one of the lowest evaluation loss on the way (1.5000); "
        "stopped early, 40 steps were planned."
    ) in text
    last = card(best={"step": 6, "loss": 1.5}, stopped_early=early)
    assert "This is the state after step 9 of 9; stopped early, 40 steps were planned." in last


def test_a_run_without_evaluation_rows_says_why() -> None:
    assert "None: data.eval_split is 0" in card(skipped="data.eval_split is 0")
