"""What a run says at its end, and several of them side by side."""

import ast
from pathlib import Path
from typing import Any

import pytest

from job.errors import InputMissing, IntegrityFailure, JobError
from launcher.compare import table
from launcher.results import Results, load
from launcher.summary import duration, loading, local_name, summary
from tests.launcher.finished import record, run_folder


def test_the_summary_tells_base_from_tuned() -> None:
    text = summary(Results("file:./runs/support-1a2b3c4d", record()))
    assert text.splitlines()[:15] == [
        "support-1a2b3c4d: finished",
        "",
        "                      base      tuned",
        "loss                3.2500     0.1250",
        "perplexity          25.790      1.133",
        "token accuracy       40.0%      97.5%",
        "exact match           0.0%      93.8%",
        "",
        "held out        128 rows, none of them in the training data",
        "time            1 min 35 s in all: prepare 1.2 s, train 1 min 04 s",
        "memory          1,500 MiB at most (cpu)",
        "checked         loaded by a fresh process: the same logits (largest difference 2e-06)",
        "adapter         runs/support-1a2b3c4d",
        "",
        "To load it:",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data__eval__also_in_train": 3}, "held out        128 rows, 3 of them in the training data"),
        ({"data": None}, "held out        128 rows"),
        ({"evaluation": {"skipped": "eval_split is 0"}}, "not evaluated: eval_split is 0"),
        ({"evaluation": None}, "not evaluated"),
        ({"evaluation__tuned__exact_match": None}, "exact match           0.0%          -"),
        ({"performance__phases": None}, "time            1 min 35 s in all"),
        ({"performance__device": None}, "memory          1,500 MiB at most"),
        ({"performance__peak_memory_bytes": {"load": 900 << 20}}, "memory          900 MiB at most (cpu)"),
        ({"run": None}, "support: finished"),
    ],
)
def test_what_a_record_lacks_is_left_out(changes: dict[str, Any], line: str) -> None:
    assert line in summary(Results("file:///tmp/support", record(**changes))).splitlines()


def test_an_empty_record_still_has_a_summary() -> None:
    assert summary(Results("runs/x", {})).splitlines()[:3] == ["x: finished", "", "not evaluated"]


@pytest.mark.parametrize("new_tokens", [[], ["<tool>"]])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_loading_lines_are_python_and_name_base_and_folder(method: str, new_tokens: list[str]) -> None:
    code = loading(Results("file:/data/it's here", record(method=method, new_tokens=new_tokens)))
    words = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {"org/base", "/data/it's here"} <= words
    assert ("quantization_config" in code) is (method == "qlora")
    assert ("resize_token_embeddings" in code) is bool(new_tokens)  # without room PEFT finds no rows for them


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("file:./runs/a", "runs/a"),
        ("file:///data/a", "/data/a"),
        ("file:/data/a/", "/data/a"),
        ("./runs/a", "runs/a"),
        ("s3://b/a", "s3://b/a"),
    ],
)
def test_a_folder_is_named_as_the_shell_wants_it(uri: str, name: str) -> None:
    assert local_name(uri) == name


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.97, "1 min 00 s"), (3599.6, "1 h 00 min")]
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_runs_are_compared_as_on_the_first_users_page() -> None:
    four_bit = record(
        method="qlora",
        run="big-11112222",
        performance__tokens_per_second=312.4,
        performance__peak_memory_bytes__train=600 << 20,
        performance__peak_memory_bytes__load=300 << 20,
        evaluation__tuned__exact_match=None,
    )
    runs = [Results("a", record()), Results("b", four_bit)]
    assert table(runs, "ja").splitlines() == [
        "| 手法 | メモリ使用量 | 学習速度 | 精度 | 用途 |",
        "| --- | --- | --- | --- | --- |",
        "| LoRA (support-1a2b3c4d) | 1,500 MiB | 312 トークン/秒 | 完全一致 93.8%, 損失 0.1250 "
        "| 一般的なファインチューニング |",
        "| QLoRA (big-11112222) | 600 MiB | 312 トークン/秒 | トークン正解率 97.5%, 損失 0.1250 "
        "| 大規模モデル・メモリ制限時 |",
        "",
        "| 実行 | 損失 | パープレキシティ | トークン正解率 | 完全一致 |",
        "| --- | --- | --- | --- | --- |",
        "| support-1a2b3c4d | 0.1250 | 1.133 | 97.5% | 93.8% |",
        "| big-11112222 | 0.1250 | 1.133 | 97.5% | - |",
    ]
    assert table(runs).splitlines()[0] == "| method | memory | training speed | accuracy | use |"


def measured_anew() -> dict[str, Any]:
    """A record with everything that an evaluation takes: differences with intervals, and figures of answers."""
    result = record(evaluation__generated_rows=64, evaluation__steps=600, evaluation__published_step=600)
    evaluation = result["evaluation"]
    evaluation["base"] |= {"extracted_match": 0.25, "chrf": 12.5, "rouge_l": 0.125}
    evaluation["tuned"] |= {"extracted_match": 0.75, "chrf": 50.0, "rouge_l": 0.5}
    evaluation["difference"] = {
        key: {
            "value": tuned - evaluation["base"][key],
            "standard_error": abs(tuned) / 100,
            "low": tuned - evaluation["base"][key] - abs(tuned) / 50,
            "high": tuned - evaluation["base"][key] + abs(tuned) / 50,
        }
        for key, tuned in evaluation["tuned"].items()
    }
    return result


def test_the_summary_says_how_sure_each_difference_is() -> None:
    lines = summary(Results("runs/x", measured_anew())).splitlines()
    assert lines[2:11] == [
        "                      base      tuned   difference [95 %]",
        "loss                3.2500     0.1250   -3.1250 [-3.1275, -3.1225]",
        "perplexity          25.790      1.133   -24.657 [-24.680, -24.634]",
        "token accuracy       40.0%      97.5%   +57.5 [+55.5, +59.4]",
        "exact match           0.0%      93.8%   +93.8 [+91.9, +95.6]",
        "extracted            25.0%      75.0%   +50.0 [+48.5, +51.5]",
        "chrF                  12.5       50.0   +37.5 [+36.5, +38.5]",
        "ROUGE-L              0.125      0.500   +0.375 [+0.365, +0.385]",
        "",
    ]
    assert lines[11] == "held out        128 rows, none of them in the training data, 64 answered"


def test_a_single_row_leaves_a_difference_without_an_interval() -> None:
    result = measured_anew()
    result["evaluation"]["difference"]["loss"] |= {"standard_error": None, "low": None, "high": None}
    assert "loss                3.2500     0.1250   -3.1250" in summary(Results("runs/x", result)).splitlines()


PUBLISHED: dict[str, tuple[dict[str, Any], str | None]] = {
    "the last step planned": ({"steps": 9, "published_step": 9, "stopped_early": None, "best": None}, None),
    "the last, which is the best": (
        {"steps": 9, "published_step": 9, "stopped_early": None, "best": {"step": 9, "loss": 1.5}},
        None,
    ),
    "the best": (
        {"steps": 9, "published_step": 6, "stopped_early": None, "best": {"step": 6, "loss": 1.5}},
        "published       step 6, of the lowest evaluation loss (1.5000)",
    ),
    "stopped early": (
        {"steps": 9, "published_step": 9, "stopped_early": {"planned_steps": 1200}, "best": {"step": 6, "loss": 1.5}},
        "published       step 9, stopped early at step 9 of 1,200",
    ),
    "the best of a run stopped early": (
        {"steps": 9, "published_step": 6, "stopped_early": {"planned_steps": 12}, "best": {"step": 6, "loss": 1.5}},
        "published       step 6, of the lowest evaluation loss (1.5000), stopped early at step 9 of 12",
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_summary_says_which_state_is_published_where_it_is_not_simply_the_last(case: str) -> None:
    changes, line = PUBLISHED[case]
    result = record()
    result["evaluation"] |= changes
    found = [one for one in summary(Results("runs/x", result)).splitlines() if one.startswith("published")]
    assert found == ([line] if line else [])


def test_every_figure_of_runs_is_compared_with_its_interval() -> None:
    runs = [Results("a", measured_anew()), Results("b", record(run="old-1"))]
    lines = table(runs).splitlines()
    assert lines[5:10] == [
        "| run | loss | perplexity | token accuracy | exact match | extracted | chrF | ROUGE-L |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| support-1a2b3c4d | 0.1250 (-3.1250 [-3.1275, -3.1225]) | 1.133 (-24.657 [-24.680, -24.634]) "
        "| 97.5% (+57.5 [+55.5, +59.4]) | 93.8% (+93.8 [+91.9, +95.6]) | 75.0% (+50.0 [+48.5, +51.5]) "
        "| 50.0 (+37.5 [+36.5, +38.5]) | 0.500 (+0.375 [+0.365, +0.385]) |",
        "| old-1 | 0.1250 | 1.133 | 97.5% | 93.8% | - | - | - |",
        "",
    ]
    assert lines[10].startswith("Tuned; in brackets the difference to the base with its 95 % interval")
    assert "抽出一致" in table(runs, "ja")


UNLIKE: dict[str, dict[str, Any]] = {
    "base model, evaluation rows": {"model": "org/other", "evaluation__rows": 64},
    "number of answered rows": {"evaluation__generated_rows": 17},
    "what is extracted from answers": {"evaluation__extract": "number"},
    "device": {"performance__device": "cuda"},
}


@pytest.mark.parametrize("words", UNLIKE)
def test_unlike_runs_are_not_passed_off_as_a_comparison_of_methods(words: str) -> None:
    same: dict[str, Any] = {"evaluation__generated_rows": 64, "evaluation__extract": r"= (\d+)"}
    alike, unlike = record(**same), record(**(same | UNLIKE[words]))
    said = f"The runs differ in {words}: the figures do not compare the methods alone."
    assert table([Results("a", alike), Results("b", unlike)]).splitlines()[-1] == said
    assert "異なるため" in table([Results("a", alike), Results("b", unlike)], "ja").splitlines()[-1]
    assert "differ" not in table([Results("a", alike), Results("b", alike)])


def test_a_figure_that_is_not_finite_says_so() -> None:
    result = measured_anew()
    for side in ("base", "tuned"):
        del result["evaluation"][side]["perplexity"]
    result["evaluation"]["difference"]["perplexity"] = {
        "value": None,
        "low": None,
        "high": None,
        "reason": "not finite",
    }
    assert "perplexity               -          -   not finite" in summary(Results("runs/x", result)).splitlines()
    assert "| 0.1250 (-3.1250 [-3.1275, -3.1225]) | - |" in table([Results("runs/x", result)])


def test_a_run_without_figures_has_a_row_of_dashes() -> None:
    assert table([Results("runs/x", {"method": "lora"})]).splitlines()[2] == (
        "| LoRA (x) | - | - | - | fine-tuning in general |"
    )


def test_results_are_read_from_the_run_s_folder(tmp_path: Path) -> None:
    results = load(f"file:{run_folder(tmp_path / 'run', record())}")
    assert results["evaluation.tuned.loss"] == 0.125
    assert results["evaluation.tuned.nothing.there"] is None


def test_a_run_that_is_not_there_or_not_finished_is_one_sentence(tmp_path: Path) -> None:
    begun = run_folder(tmp_path / "begun", record(), finished=False)
    broken = run_folder(tmp_path / "broken", record())
    (broken / "eval_results.json").write_text("{", encoding="utf-8")
    cases: list[tuple[Path, type[JobError], str]] = [
        (tmp_path / "absent", InputMissing, "no finished run"),
        (begun, InputMissing, "not finished"),
        (broken, IntegrityFailure, "not a JSON object"),
    ]
    for folder, kind, words in cases:
        with pytest.raises(kind, match=words) as refused:
            load(str(folder))
        assert "\n" not in str(refused.value)
