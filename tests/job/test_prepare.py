"""The whole of ``prepare``: files in, sealed rows and a report out; and every refusal with its exit code."""

import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from job.data import prepare, prepared, row_maker
from job.data.data_report import lines_of, sources_of
from job.data.formats import Shape
from job.data.row_writer import Counts
from job.data.rows import Row
from job.exits import ExitCode
from job.files import read_json
from job.inputs import Input, Inputs, write_inputs
from job.workdir import WorkDir
from tests.job.made import made_spec
from tests.job.tiny import CHATML, IM_END, as_messages, numbered_rows, toy_messages, toy_rows, write_rows

Run = Callable[..., WorkDir]


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path) -> Run:
    """Prepares ``rows`` (one list, or several files by name) in a fresh work directory."""
    count = iter(range(100))

    def run_(
        rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
        model: Path = tiny_llama,
        evaluation: Sequence[Mapping[str, Any]] | None = None,
        training: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        **data: Any,
    ) -> WorkDir:
        root = tmp_path / f"run-{next(count)}"
        files = rows if isinstance(rows, Mapping) else {"train.jsonl": rows}
        train = [Input(name, write_rows(root / name, content)) for name, content in files.items()]
        eval_ = None if evaluation is None else Input("eval.jsonl", write_rows(root / "eval.jsonl", evaluation))
        spec = {
            "name": "test",
            "model": "tiny",
            "data": {"train": list(files), "eval": eval_.uri if eval_ else None, **data},
            "training": {"max_length": 128, **(training or {})},
            "lora": lora or {},
        }
        workdir = WorkDir(root)
        workdir.spec.write_text(yaml.safe_dump(spec), encoding="utf-8")
        write_inputs(workdir.inputs, Inputs(Input("tiny", model), tuple(train), eval_))
        prepare.main([str(root)])
        return workdir

    return run_


def outcome(workdir: WorkDir) -> tuple[int, str]:
    record = read_json(workdir.outcome("prepare"))
    return record["exit_code"], record["message"]


def loaded(workdir: WorkDir) -> prepared.Prepared:
    assert outcome(workdir) == (0, "")
    return prepared.load(workdir.prepared)


def refused(workdir: WorkDir, code: ExitCode) -> str:
    """The message; nothing half done is left."""
    found, message = outcome(workdir)
    assert found == code, message
    assert not workdir.prepared.exists()
    assert "\n" not in message
    return message


def tokenizer_of(workdir: WorkDir) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(workdir.prepared / "tokenizer")


def test_rows_come_back_as_they_were_written(run: Run) -> None:
    workdir = run(toy_rows(30))
    data, tokenizer = loaded(workdir), tokenizer_of(workdir)
    rows = data.train
    assert len(rows) == 30
    for i, row in enumerate(toy_rows(30)):
        tokens, labels = rows.tokens(i), rows.labels(i)
        assert tokens.dtype == labels.dtype == np.int32
        assert len(tokens) == len(labels) == rows.lengths[i]
        assert labels[0] == prepared.IGNORED
        assert (labels[labels != prepared.IGNORED] == tokens[labels != prepared.IGNORED]).all()
        assert rows.supervised[i] == (labels != prepared.IGNORED).sum()
        assert tokenizer.decode(tokens[labels != prepared.IGNORED]) == row["completion"] + IM_END
        assert rows.answer(i) == row["completion"]
        assert rows.origin(i) == f"train.jsonl:{i + 1}"


def test_rows_that_are_evaluated_keep_the_prompt_the_model_is_asked_with(run: Run) -> None:
    workdir = run(toy_rows(3), evaluation=toy_rows(30))
    data, tokenizer = loaded(workdir), tokenizer_of(workdir)
    assert data.eval is not None
    for i, row in enumerate(toy_rows(30)):
        messages = as_messages(row)["messages"][:-1]
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert data.eval.prompt(i).tolist() == served
    assert len(data.train.prompt(0)) == 0


def test_many_processes_make_what_one_makes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[dict[str, Any]]] = {"a.jsonl": numbered_rows(900), "b.csv": toy_rows(300)}
    rows["a.jsonl"][450] = {"prompt": "x"}
    alone = run(rows, eval_split=0.1, max_bad_rows=1)
    monkeypatch.setattr(row_maker, "_WORTH_BYTES", 0)
    monkeypatch.setattr(row_maker, "_cpu_limit", lambda: 2)
    monkeypatch.setattr(row_maker.os, "sched_getaffinity", lambda pid: {0, 1})
    together = run(rows, eval_split=0.1, max_bad_rows=1)
    for name in ("digest", "eval_digest"):
        assert loaded(alone).info[name] == loaded(together).info[name]
    assert read_json(alone.data_report) == read_json(together.data_report)
    rows["a.jsonl"][440] = {"prompt": "y"}
    assert refused(run(rows, max_bad_rows=1), ExitCode.DATA).startswith("a.jsonl:451: missing column")
    assert multiprocessing.active_children() == []


def test_more_rows_than_one_batch_keep_their_order(run: Run) -> None:
    data = loaded(run(numbered_rows(2500)))
    assert [data.train.answer(i) for i in (0, 999, 1000, 2499)] == [
        numbered_rows(2500)[i]["completion"] for i in (0, 999, 1000, 2499)
    ]
    assert data.train.lengths.sum() == sum(len(data.train.tokens(i)) for i in range(2500))


def test_several_files_are_told_apart(run: Run) -> None:
    files = {"a.jsonl": toy_messages(3), "b.parquet": toy_rows(2), "c.csv": numbered_rows(4)}
    data = loaded(run(files))
    assert data.train.sources.tolist() == [0] * 3 + [1] * 2 + [2] * 4
    assert data.train.sources.dtype == np.int16
    assert data.train.origin(4) == "b.parquet:2"
    assert data.info["sources"] == list(files)


def test_the_same_rows_give_the_same_digest_and_any_change_another(run: Run) -> None:
    rows = numbered_rows(20)
    digests = [
        loaded(run(content, **more)).info["digest"]
        for content, more in (
            (rows, {}),
            ({"other.csv": rows}, {}),
            (rows[::-1], {}),
            (rows[:-1], {}),
            (rows, {"train_on": "all"}),
            ({"a.jsonl": rows[:5], "b.jsonl": rows[5:]}, {}),
            (rows, {"evaluation": rows[:1]}),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1


def test_the_split_is_stable_when_rows_are_added(run: Run) -> None:
    def answers(rows: prepared.Rows | None) -> set[str]:
        assert rows is not None
        return {bytes(rows.tokens(i)).hex() for i in range(len(rows))}

    small = loaded(run(numbered_rows(200), eval_split=0.1))
    large = loaded(run(numbered_rows(400), eval_split=0.1))
    assert answers(small.eval) < answers(large.eval)
    assert answers(small.train) < answers(large.train)
    assert not answers(large.eval) & answers(large.train)


def test_equal_rows_stay_on_one_side(run: Run) -> None:
    data = loaded(run(numbered_rows(60) * 3, eval_split=0.2))
    assert data.eval is not None
    assert len(data.eval) % 3 == len(data.train) % 3 == 0


def test_duplicates_and_rows_also_in_training_are_reported(run: Run) -> None:
    rows = numbered_rows(10)
    workdir = run(rows + rows[:4], evaluation=[as_messages(rows[0]), as_messages(toy_rows(1)[0])])
    report = read_json(workdir.data_report)
    assert report["train"]["duplicates"] == 4
    assert report["eval"]["also_in_train"] == 1
    assert report["eval"]["kept"] == 2
    assert report["warnings"] == ["1 evaluation rows are trained on, too; the evaluation is too good by them"]
    assert loaded(workdir).info["eval_sources"] == ["eval.jsonl"]


def test_rows_that_were_dropped_are_neither_duplicates_nor_overlap(run: Run) -> None:
    rows = [*numbered_rows(10), LONG, LONG]
    report = read_json(run(rows, evaluation=[*toy_rows(3), LONG, LONG], max_dropped=0.5).data_report)
    assert report["train"]["duplicates"] == report["eval"]["duplicates"] == report["eval"]["also_in_train"] == 0
    assert (report["train"]["kept"], report["eval"]["kept"], report["warnings"]) == (10, 3, [])


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|endoftext|>\n", ""])
def test_an_end_of_text_that_the_file_writes_out_is_no_part_of_the_answer(run: Run, tiny_gpt2: Path, end: str) -> None:
    row = {"prompt": "plum: ", "completion": f"purple{end}"}
    rows = loaded(run(toy_rows(1), model=tiny_gpt2, evaluation=[row])).eval
    assert rows is not None
    assert rows.answer(0) == "purple"


def test_a_batch_of_long_conversations_is_bounded_like_one_of_long_columns() -> None:
    shape = Shape("messages", {"messages": "messages"})
    long = [Row("a", i, as_messages({"prompt": "x" * 100_000, "completion": "y"})) for i in range(25)]
    short = [Row("a", i, as_messages(toy_rows(1)[0])) for i in range(300)]
    assert [len(batch.items) for batch in row_maker.batches(0, long, lambda row: shape)] == [10, 10, 5]
    assert [len(batch.items) for batch in row_maker.batches(0, short, lambda row: shape)] == [200, 100]
    nested: Any = "x"
    for _ in range(5000):
        nested = [nested]
    assert row_maker._characters({"deep": nested}) > 5000


def test_what_each_file_gives_to_an_epoch_is_reported(run: Run) -> None:
    workdir = run(
        {"a.jsonl": numbered_rows(10), "b.jsonl": toy_rows(6)},
        train=["a.jsonl", {"from": "b.jsonl", "weight": 0.5}],
    )
    sources = read_json(workdir.data_report)["sources"]
    assert [(one["from"], one["rows"], one["weight"], one["rows_per_epoch"]) for one in sources] == [
        ("a.jsonl", 10, 1.0, 10),
        ("b.jsonl", 6, 0.5, 3),
    ]
    rows = loaded(workdir).train
    assert sources[1]["tokens"] == rows.lengths[rows.sources == 1].sum()


def test_a_file_that_is_given_twice_is_reported_twice() -> None:
    spec = made_spec(data={"train": ["a", {"from": "a", "weight": 2}]})
    counts = Counts(source_rows=Counter({0: 5, 1: 4}), source_tokens=Counter({0: 50, 1: 40}))
    sources = sources_of(counts, spec)
    assert [(one["rows"], one["tokens"], one["rows_per_epoch"]) for one in sources] == [(5, 50, 5), (4, 40, 8)]
    report = {"files": {"a": "text", "e": "text"}, "sources": sources, "no_eval": None, "bad_rows": {}, "warnings": []}
    assert lines_of(report | {"train": None, "eval": None}) == [
        "a: text, 5 training rows",
        "a: text, 4 training rows, weight 2: 8 an epoch",
        "e: text",
    ]


def test_new_tokens_are_one_token_each_and_fit_the_model(run: Run) -> None:
    rows = [{"prompt": "<fruit>", "completion": "<red>"}]
    workdir = run(rows, lora={"new_tokens": ["<fruit>", "<red>"]})
    info, tokenizer = loaded(workdir).info, tokenizer_of(workdir)
    assert info["vocabulary"] == len(tokenizer)
    assert info["new_tokens"] == tokenizer.convert_tokens_to_ids(["<fruit>", "<red>"])
    assert set(info["new_tokens"]) <= set(loaded(workdir).train.tokens(0).tolist())


def test_evaluation_rows_do_not_make_up_for_training_rows_that_were_dropped(run: Run) -> None:  # T12
    many = numbered_rows(200)
    message = refused(run([LONG] * 9 + toy_rows(1), evaluation=many), ExitCode.DATA)
    assert message.startswith("data.train: 9 of 10 rows dropped (9 longer than training.max_length 128 tokens")
    message = refused(run(many, evaluation=[LONG] * 2 + toy_rows(3)), ExitCode.DATA)
    assert message.startswith("data.eval: 2 of 5 rows dropped (2 longer")


def test_rows_set_aside_are_rows_of_the_training_data(run: Run) -> None:  # T12
    """Few rows set aside, one of them too long: no share of the file."""
    data = loaded(run([LONG, *numbered_rows(40)], eval_split=0.2))
    assert data.eval is not None
    assert len(data.train) + len(data.eval) == 40


def test_a_tolerance_that_takes_every_row_names_the_first(run: Run) -> None:  # T36
    rows = [{"prompt": "a", "completion": None}, {"prompt": "b", "completion": " "}]
    message = refused(run(rows, max_bad_rows=5), ExitCode.DATA)
    assert message == (
        "data.train: no row is left to train on (bad rows: 2, the first: train.jsonl:1: not text: column 'completion' "
        "is null; text is needed); correct them, or name other data"
    )
    message = refused(run([{"a": "1"}, {"b": "2"}], max_bad_rows=5), ExitCode.DATA)
    assert "bad rows: 2, the first: train.jsonl:1: unknown columns" in message


def test_a_file_that_gives_nothing_is_warned_of(run: Run) -> None:
    report = read_json(run({"a.jsonl": toy_rows(3), "b.jsonl": [{"x": "1"}]}, max_bad_rows=1).data_report)
    assert report["warnings"] == ["b.jsonl: no row of it is trained on"]
    assert report["bad_examples"][0].startswith("b.jsonl:1: unknown columns")


def test_the_first_row_that_fits_says_the_shape(run: Run) -> None:
    rows = [{"note": "a secret"}, {}, *toy_rows(3)]
    workdir = run(rows, max_bad_rows=2)
    assert len(loaded(workdir).train) == 3
    report = read_json(workdir.data_report)
    assert report["bad_rows"] == {"unknown columns": 2}
    assert not any(word in json.dumps(report) for word in ("secret", "note"))
    for tolerance in (0, 1):
        message = refused(run(rows, max_bad_rows=tolerance), ExitCode.DATA)
        assert message.startswith(f"train.jsonl:{tolerance + 1}: no known format has the columns")


def test_a_system_column_beside_messages_is_read(run: Run) -> None:
    workdir = run([toy_messages(1)[0] | {"system": "Be brief."}])
    assert "Be brief." in tokenizer_of(workdir).decode(loaded(workdir).train.tokens(0))


def test_keys_of_messages_that_are_not_used_are_named(run: Run) -> None:
    """Such as another program's word for what is not trained: ours is ``weight``."""
    row = toy_messages(1)[0]
    row["messages"][1] |= {"train": False, "name": "bot", "weight": 1}
    assert read_json(run([row]).data_report)["warnings"] == ["train.jsonl: not used: 'messages[].train'"]


def test_columns_that_are_not_used_are_named_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": i, **row, "history": [["q", "a"]]} for i, row in enumerate(toy_rows(4))]
    with caplog.at_level("INFO", logger="job.data.prepare"):
        workdir = run({"a.jsonl": rows, "b.jsonl": toy_rows(2)})
    report = read_json(workdir.data_report)
    assert report["unused_columns"] == {"a.jsonl": ["id", "history"]}
    assert report["warnings"] == ["a.jsonl: not used: 'id', 'history'"]
    assert caplog.text.count("warning: a.jsonl: not used: 'id', 'history'") == 1


def test_a_parquet_column_that_nobody_uses_may_hold_anything(run: Run) -> None:  # T36
    workdir = run({"a.parquet": [row | {"when": 0} for row in toy_rows(3)]})
    path = workdir.root / "a.parquet"
    table = pyarrow.parquet.read_table(path)
    late = pa.array([2**63 - 1] * 3, pa.timestamp("us"))
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index("when"), "when", late), path)
    prepare.main([str(workdir.root)])
    assert len(loaded(workdir).train) == 3
    assert read_json(workdir.data_report)["unused_columns"] == {"a.parquet": ["when"]}
    pyarrow.parquet.write_table(pa.table({"when": late}), path)
    prepare.main([str(workdir.root)])
    assert outcome(workdir)[1].startswith("a.parquet:1: no known format has the columns 'when'")


def test_a_column_that_the_first_row_lacks_is_not_lost(run: Run) -> None:
    rows = [toy_rows(1)[0], toy_rows(1)[0] | {"system": "Be brief."}]
    workdir = run(rows)
    texts = [tokenizer_of(workdir).decode(loaded(workdir).train.tokens(i)) for i in range(2)]
    assert ["Be brief." in text for text in texts] == [False, True]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({}, "neither data.eval nor data.eval_split"),
        ({"eval_split": 1e-6}, "eval_split 1e-06 of 30 rows sets none aside"),
    ],
)
def test_without_evaluation_rows_the_run_goes_on_and_says_why(run: Run, data: dict[str, Any], why: str) -> None:
    workdir = run(toy_rows(30), **data)
    assert loaded(workdir).eval is None
    assert why in read_json(workdir.data_report)["no_eval"]
    assert why in loaded(workdir).info["no_eval"]


def test_a_model_without_template_gets_plain_text(run: Run, tiny_gpt2: Path) -> None:
    workdir = run(toy_rows(5), model=tiny_gpt2)
    data, tokenizer = loaded(workdir), tokenizer_of(workdir)
    row = toy_rows(5)[0]
    assert tokenizer.decode(data.train.tokens(0)) == row["prompt"] + row["completion"] + "<|endoftext|>"
    assert data.train.labels(0)[-1] == tokenizer.eos_token_id
    assert data.info["pad_id"] == data.info["eos_id"] == tokenizer.eos_token_id
    assert data.info["template"] is None
    assert tokenizer.chat_template is None


def test_conversations_without_template_are_refused_with_the_names(run: Run, tiny_gpt2: Path) -> None:  # T50
    message = refused(run(toy_messages(5), model=tiny_gpt2), ExitCode.CONFIG)
    assert message.startswith("train.jsonl holds conversations")
    assert "chatml, llama3, gemma, qwen" in message


def test_the_template_used_is_saved_with_the_tokenizer(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{- 'X' }}" + CHATML, encoding="utf-8")
    for setting, name in ((None, "model"), ("qwen", "qwen"), (str(own), str(own))):
        workdir = run(toy_messages(3), chat_template=setting)
        info, tokenizer = loaded(workdir).info, tokenizer_of(workdir)
        assert info["template"] == name
        assert info["end_of_turn"] == [tokenizer.convert_tokens_to_ids(IM_END)]
        served = tokenizer.apply_chat_template(toy_messages(3)[0]["messages"], return_dict=False)
        assert served == loaded(workdir).train.tokens(0).tolist()


def test_none_means_plain_text_even_with_a_template_of_the_models_own(run: Run) -> None:
    workdir = run(toy_rows(3), chat_template="none")
    assert tokenizer_of(workdir).chat_template is None
    assert loaded(workdir).info["masks"] == {"plain text": 3}


LONG = {"prompt": "count " * 200, "completion": "one two"}
ANSWER = {"prompt": "count", "completion": "one two " * 200}


@pytest.mark.parametrize(
    ("policy", "kept", "cut", "dropped"),
    [
        ("drop", 20, 0, {"longer than training.max_length": 2}),
        ("truncate", 21, 1, {"nothing left to train": 1}),
        ("truncate_prompt", 21, 1, {"longer than training.max_length": 1}),
    ],
)
def test_long_rows_are_cut_or_dropped_and_counted(  # T12
    run: Run, policy: str, kept: int, cut: int, dropped: dict[str, int]
) -> None:
    workdir = run([*toy_rows(20), LONG, ANSWER], training={"long_rows": policy})
    report, data = read_json(workdir.data_report)["train"], loaded(workdir)
    assert (report["read"], report["kept"], report["cut"], report["dropped"]) == (22, kept, cut, dropped)
    assert len(data.train) == kept
    assert data.train.lengths.max() <= 128
    assert report["tokens"] == data.train.lengths.sum()
    assert report["supervised"] == data.train.supervised.sum()
    assert report["lost_tokens"] == sum(report["lost_by"].values()) > 200
    assert set(report["lost_by"]) == set(report["dropped"]) | set(report["cut_by"])
    assert sum(rows for _, rows in report["histogram"]) == kept
    ends = [data.train.tokens(i)[-2] == data.info["eos_id"] for i in range(20, kept)]
    assert ends == ([True] if policy == "truncate_prompt" else [False] if policy == "truncate" else [])


def test_a_long_row_is_named_where_that_is_wanted(run: Run) -> None:  # T12
    message = refused(run([*toy_rows(3), LONG], training={"long_rows": "error"}), ExitCode.DATA)
    assert message.startswith("train.jsonl:4: ")
    assert "training.max_length 128" in message


def test_too_many_dropped_rows_are_refused_with_the_numbers(run: Run) -> None:  # T12
    rows = [*toy_rows(8), LONG, LONG]
    message = refused(run(rows), ExitCode.DATA)
    assert "2 of 10 rows dropped (2 longer than training.max_length 128 tokens (the longest has " in message
    assert len(loaded(run(rows, max_dropped=0.2)).train) == 8


def test_data_that_would_train_nothing_is_refused(run: Run) -> None:  # T12, T13
    assert "no row is left" in refused(run([LONG], max_dropped=1), ExitCode.DATA)
    truncated = run([LONG], max_dropped=1, training={"long_rows": "truncate"})
    assert "nothing left to train" in refused(truncated, ExitCode.DATA)


def test_bad_rows_are_counted_by_reason_or_refused(run: Run) -> None:  # T36
    rows = [*toy_rows(3), {"prompt": "x", "completion": None}, {"prompt": "x"}, {"prompt": "x", "completion": " "}]
    message = refused(run(rows, max_bad_rows=2), ExitCode.DATA)
    assert message.startswith("train.jsonl:6: empty answer")
    workdir = run(rows, max_bad_rows=3)
    report = read_json(workdir.data_report)
    assert report["bad_rows"] == {"not text": 1, "missing column": 1, "empty answer": 1}
    assert report["train"]["kept"] == 3


def test_a_length_beyond_the_models_positions_is_refused_with_both(run: Run, tiny_gpt2: Path) -> None:
    message = refused(run(toy_rows(3), model=tiny_gpt2, training={"max_length": 257}), ExitCode.CONFIG)
    assert "257 tokens" in message
    assert "256 positions (n_positions" in message
    loaded(run(toy_rows(3), model=tiny_gpt2, training={"max_length": 256}))


@pytest.mark.parametrize("inside", [True, False])
def test_a_length_at_which_longrope_depends_on_the_batch_is_refused(  # T1
    run: Run, tiny_llama: Path, tmp_path: Path, inside: bool
) -> None:
    original = {"original_max_position_embeddings": 100}
    rope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], **(original if inside else {})}
    model = broken_model(tiny_llama, tmp_path / "long", rope_scaling=rope, **({} if inside else original))
    message = refused(run(toy_rows(3), model=model, training={"max_length": 128}), ExitCode.CONFIG)
    assert "write 100 or less" in message
    loaded(run(toy_rows(3), model=model, training={"max_length": 100}))


def broken_model(tiny: Path, folder: Path, **config: Any) -> Path:
    """A copy of a model's tokenizer with another config."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({**read_json(tiny / "config.json"), **config}), encoding="utf-8")
    return folder


def test_a_tokenizer_larger_than_the_model_is_refused(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    model = broken_model(tiny_llama, tmp_path / "small", vocab_size=100)
    message = refused(run(toy_rows(3), model=model), ExitCode.CONFIG)
    assert "the model knows 100 (vocab_size" in message


def test_a_folder_that_is_no_model_is_refused(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "tiny has no config.json" in refused(run(toy_rows(3), model=tmp_path / "empty"), ExitCode.NOINPUT)
    model = broken_model(tiny_llama, tmp_path / "broken")
    (model / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "the tokenizer of tiny cannot be loaded" in refused(run(toy_rows(3), model=model), ExitCode.CONFIG)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"init": "pissa", "r": 100}, "100 directions of a matrix of 64"),
        ({"rank_pattern": {"q_porj": 2}}, "'q_porj' matches no layer that is adapted"),
        ({"new_tokens": ["<x>"], "target_modules": ["q_proj", "lm_head"]}, "lm_head is among lora.target_modules"),
        ({"modules_to_save": ["nrom"]}, "nrom matches nothing in this model"),
        ({"modules_to_save": ["model"]}, "lora.modules_to_save: model: whole, they leave no layer"),
        ({"new_tokens": ["<x>", IM_END]}, f"lora.new_tokens: the model's tokenizer knows '{IM_END}' already"),
        ({"new_tokens": ["a"]}, "lora.new_tokens: the model's tokenizer knows 'a' already"),
    ],
)
def test_what_the_model_cannot_do_is_refused_with_the_data(
    run: Run, lora: dict[str, Any], words: str
) -> None:  # T20 T48
    assert words in refused(run(toy_rows(8), lora=lora), ExitCode.CONFIG)


def test_an_earlier_result_is_replaced_whole(run: Run) -> None:
    workdir = run(toy_rows(3), eval_split=0.5)
    (workdir.prepared / "stale").write_text("x", encoding="utf-8")
    prepare.main([str(workdir.root)])
    assert not (workdir.prepared / "stale").exists()
    assert sorted(path.name for path in workdir.root.iterdir() if path.name.startswith(".")) == []


def test_the_log_is_a_few_lines_for_people(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="job.data.prepare"):
        run([*toy_rows(20), LONG])
    text = caplog.text
    assert "train.jsonl: prompt_completion (prompt, completion)" in text
    assert "training rows: 20 of 21, 1 dropped (longer than training.max_length)" in text
    assert "no evaluation: neither" in text


REAL: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "gsm8k": ("gsm8k/test.jsonl", {}, "prompt_completion (question, answer)", 1319),
    "mgsm": ("mgsm-ja/mgsm_ja.tsv", {"columns": {"prompt": "0", "completion": "1"}}, "prompt_completion (0, 1)", 250),
    "sharegpt": ("sharegpt/dummy_conversation.json", {}, "sharegpt (conversations)", 500),
    "messages": ("fms-hf-tuning/multi_turn_chat.jsonl", {}, "messages (messages)", 10),
    "conversations": ("fms-hf-tuning/multi_turn_chat_conversations.jsonl", {}, "sharegpt (conversations)", 10),
    "twitter": (
        "fms-hf-tuning/twitter_complaints_small.json",
        {"columns": {"prompt": "Tweet text", "completion": "text_label"}},
        "prompt_completion (Tweet text, text_label)",
        10,
    ),
}


@pytest.mark.parametrize(("file", "data", "shape", "count"), REAL.values(), ids=REAL)
def test_real_data_is_read_whole(
    real_data: Path, tiny_llama: Path, tmp_path: Path, file: str, data: dict[str, Any], shape: str, count: int
) -> None:
    workdir = WorkDir(tmp_path)
    spec = {"name": "test", "model": "tiny", "data": {"train": file, **data}, "training": {"max_length": 2048}}
    workdir.spec.write_text(yaml.safe_dump(spec), encoding="utf-8")
    write_inputs(workdir.inputs, Inputs(Input("tiny", tiny_llama), (Input(file, real_data / file),), None))
    assert prepare.main([str(tmp_path)]) == 0
    assert read_json(workdir.data_report)["files"] == {file: shape}
    rows = prepared.load(workdir.prepared).train
    assert len(rows) == count
    assert (rows.supervised > 0).all()


@pytest.mark.parametrize("file", ["malformatted_data.json", "empty_data.json"])
def test_real_broken_data_is_refused(real_data: Path, tiny_llama: Path, tmp_path: Path, file: str) -> None:
    workdir = WorkDir(tmp_path)
    workdir.spec.write_text(f"{{name: test, model: tiny, data: {{train: {file}}}}}", encoding="utf-8")
    source = Input(file, real_data / "fms-hf-tuning" / file)
    write_inputs(workdir.inputs, Inputs(Input("tiny", tiny_llama), (source,), None))
    assert prepare.main([str(tmp_path)]) == ExitCode.DATA
    assert refused(workdir, ExitCode.DATA).startswith(file)
