"""Which columns mean what, and which rows cannot be used."""

import re
from typing import Any

import pytest

from job.data.formats import Conversation, PlainText, example_of, is_set_aside, key_of, recognise
from job.data.row_error import RowError
from job.errors import DataInvalid, SpecInvalid
from tests.job.tiny import numbered_rows

U, A, S = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


def example(row: dict[str, Any], wanted: str | None = None, has_template: bool = True, **named: str) -> Any:
    return example_of(row, recognise(row, wanted, named, "train.jsonl:1"), has_template)


RECOGNISED: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": [], "prompt": "", "completion": ""}, "messages"),
    "sharegpt": ({"id": 1, "conversations": []}, "sharegpt"),
    "alpaca": ({"instruction": "", "input": "", "output": ""}, "alpaca"),
    "alpaca without input": ({"instruction": "", "output": ""}, "alpaca"),
    "prompt": ({"prompt": "", "completion": ""}, "prompt_completion"),
    "question": ({"question": "", "answer": "", "id": 1}, "prompt_completion"),
    "input": ({"input": "", "output": ""}, "prompt_completion"),
    "text": ({"text": ""}, "text"),
}


@pytest.mark.parametrize(("row", "wanted"), RECOGNISED.values(), ids=RECOGNISED)
def test_the_columns_of_the_first_row_say_the_format(row: dict[str, Any], wanted: str) -> None:
    assert recognise(row, None, {}, "train.jsonl:1").format == wanted


def test_an_unknown_format_lists_the_columns_found_and_what_to_write() -> None:
    with pytest.raises(DataInvalid) as caught:
        recognise(["Tweet text", "label"], None, {}, "train.jsonl:1")
    message = str(caught.value)
    assert message.startswith("train.jsonl:1: ")
    for words in ("'Tweet text', 'label'", "alpaca: instruction+output", "data.columns: {prompt: COLUMN"):
        assert words in message


def test_a_wanted_format_that_does_not_fit_says_what_it_needs() -> None:
    with pytest.raises(DataInvalid, match=r"data\.format alpaca .*'text'.*instruction\+output"):
        recognise(["text"], "alpaca", {}, "train.jsonl:1")


def test_named_columns_win_over_the_usual_names() -> None:
    row = {"instruction": "i", "output": "o", "q": "Q", "a": "A"}
    assert example(row, has_template=False, prompt="q", completion="a") == PlainText("Q", "A")
    assert example(row, wanted="alpaca", prompt="q") == Conversation(
        ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "o"})
    )


def test_a_named_column_that_is_absent_is_refused() -> None:
    with pytest.raises(
        DataInvalid, match=r"data\.columns\.system: no column 'rules'; the row has 'prompt', 'completion'"
    ):
        recognise(["prompt", "completion"], None, {"system": "rules"}, "train.jsonl:1")


def test_parts_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(SpecInvalid, match=r"data\.columns: no format has the parts messages, text together"):
        recognise(["a", "b"], None, {"messages": "a", "text": "b"}, "train.jsonl:1")


def test_sharegpt_and_openai_messages_are_the_same_conversation() -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s"}
    assert example({"messages": [S, U, A]}) == example(sharegpt) == example({"conversations": [S, U, A]})
    assert example({"messages": [U, A], "system": "s"}) == example(sharegpt)
    assert example({"messages": [S, U, A], "system": "not put before another"}) == example(sharegpt)


def test_alpaca_without_template_is_the_published_prompt() -> None:
    with_input = example({"instruction": "Add {them}.", "input": "1 2", "output": "3"}, has_template=False)
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {them}.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )
    without = example({"instruction": "Sing.", "input": None, "output": "La"}, has_template=False)
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n"
    )


def test_with_a_template_questions_and_answers_become_messages() -> None:
    wanted = Conversation((S, {"role": "user", "content": "u\n\nx"}, A))
    assert example({"instruction": "u", "input": "x", "output": "a", "system": "s"}) == wanted


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "missing column": ({"prompt": "u"}, "missing column: 'completion'; columns of other names: 1"),
    "null": ({"prompt": "u", "completion": None}, "column 'completion' is null"),
    "number": ({"prompt": "u", "completion": 3}, "column 'completion' is int"),
    "list": ({"prompt": ["u"], "completion": "a"}, "column 'prompt' is list"),
    "empty answer": ({"prompt": "u", "completion": " \n"}, "empty answer: column 'completion'"),
    "NUL": ({"prompt": "u\0", "completion": "a"}, "column 'prompt' holds a NUL"),
    "half a surrogate": ({"prompt": "u", "completion": "\ud800"}, "half a surrogate"),
}


@pytest.mark.parametrize(("row", "what"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], what: str) -> None:  # T36
    shape = recognise(["prompt", "completion"], None, {}, "train.jsonl:1")
    with pytest.raises(RowError, match=re.escape(what)):
        example_of(row, shape, True)


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "null": (None, "not a list of messages"),
    "empty": ([], "not a list of messages"),
    "strings": (["hello"], "messages[0] is not an object"),
    "unknown role": ([{"role": "wizard", "content": "x"}], "messages[0].role is none of system"),
    "odd weight": ([U, {**A, "weight": "secret"}], "messages[1].weight is neither 0"),
    "call": ([U, {**A, "tool_calls": [{"name": "f", "arguments": "secret"}]}], "arguments holds a call or tools"),
    "call of digits": ([U, {**A, "tool_calls": [{"name": "f", "arguments": "1" * 5000}]}], "Exceeds the limit"),
    "null content": ([U, {"role": "assistant", "content": None}], "messages[1].content is null"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content is list"),
    "empty answer": ([U, {"role": "assistant", "content": ""}, U, A], "messages[1].content is empty"),
    "assistant first": ([A, U, A], "messages[0] is assistant; first comes system or user"),
    "two questions": ([U, U, A], "messages[1] is user; after user comes assistant"),
    "late system": ([U, A, S, U, A], "messages[2] is system; after assistant comes user or tool"),
    "no answer": ([U, A, U], "messages ends with user"),
}


@pytest.mark.parametrize(("messages", "what"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_messages_out_of_order_are_named_by_position(messages: Any, what: str) -> None:  # T36
    with pytest.raises(RowError, match=re.escape(what)) as caught:
        example({"messages": messages})
    # The report holds no word of the data.
    assert not any(word in str(caught.value) for word in ("wizard", "secret", "hello"))


def test_a_system_column_without_template_is_not_lost_silently() -> None:
    with pytest.raises(RowError, match="without a chat template"):
        example({"prompt": "u", "completion": "a", "system": "s"}, has_template=False)


def test_the_split_depends_on_content_alone() -> None:
    keys = [key_of(example(row)) for row in numbered_rows(2000)]
    aside = [is_set_aside(key, 0.1) for key in keys]
    assert 150 < sum(aside) < 250
    assert [is_set_aside(key_of(example({"id": 7, **row})), 0.1) for row in numbered_rows(500)] == aside[:500]
    assert not any(is_set_aside(key, 0.0) for key in keys)


def test_a_larger_share_keeps_what_a_smaller_one_took() -> None:
    keys = [key_of(example(row)) for row in numbered_rows(500)]
    assert {k for k in keys if is_set_aside(k, 0.05)} < {k for k in keys if is_set_aside(k, 0.2)}
