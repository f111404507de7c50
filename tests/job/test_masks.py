"""Golden masks under templates as models publish them: thoughts, tools, weights; and how masks are found."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data import chat
from job.data.formats import Conversation, example_of, recognise
from job.data.row_error import RowError
from job.data.templates import PATCHED
from tests.job.talking import EOT, SPECIAL, TURN_END, conversation, encode, fast, named, published, runs
from tests.job.tiny import CHATML, IM_END, tokenizer_of

THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return fast(tokenizer_of(SPECIAL))


TURNS = ("What is 1+1?", "two", "And 2+2?", "four")
THINKING = ("a?", f"{THOUGHT}one", "b?", f"{THOUGHT}two")

GOLDEN: dict[str, tuple[str, Conversation, list[str]]] = {
    "llama3": ("llama3", conversation(*TURNS, system="Be brief."), [f"two{EOT}", f"four{EOT}"]),
    "llama3.1": ("llama3_1", conversation(*TURNS), [f"two{EOT}", f"four{EOT}"]),
    "gemma": ("gemma", conversation(*TURNS), [f"two{TURN_END}", f"four{TURN_END}"]),
    "qwen2.5": ("qwen2_5", conversation(*TURNS), [f"two{IM_END}", f"four{IM_END}"]),
    # Qwen3 puts an empty thought before the last answer, which the model has to write, too.
    "qwen3": ("qwen3", conversation(*TURNS), [f"two{IM_END}", f"<think>\n\n</think>\n\nfour{IM_END}"]),
    "qwen3 thinking": ("qwen3", conversation(*THINKING), [f"one{IM_END}", f"{THOUGHT}two{IM_END}"]),
    "qwen2.5 thinking": ("qwen2_5", conversation(*THINKING), [f"{THOUGHT}one{IM_END}", f"{THOUGHT}two{IM_END}"]),
}


@pytest.mark.parametrize(("name", "example", "trained"), GOLDEN.values(), ids=GOLDEN)
def test_published_templates_train_the_answers_and_their_end(
    name: str, example: Conversation, trained: list[str], tokenizer: Any
) -> None:
    """T6, T11, T50: what the model's own template writes is trained on, whichever way its answers are found."""
    own = published(name, tokenizer)
    by_sentinels, masked = encode(example, replace(own, patched=()), tokenizer)
    assert by_sentinels.way == "sentinels"
    assert runs(masked, tokenizer) == trained
    found, row = encode(example, own, tokenizer)
    assert row.trained.tolist() == masked.trained.tolist()
    assert found == replace(by_sentinels, way=found.way)
    assert found.way == ("sentinels" if name == "llama3_1" else "patched template")
    served = tokenizer.apply_chat_template(list(example.messages), return_dict=False)
    assert row.tokens.tolist() == served  # T8: what is trained is what is served


TOOL = {"name": "weather", "description": "The weather of a town.", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"town": "Kyoto"}}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Is it raining in Kyoto?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "No, the sun shines."},
    ],
    "tools": json.dumps([TOOL]),
}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Is it raining in Kyoto?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "No, the sun shines."},
    ],
    "tools": [{"type": "function", "function": TOOL}],
}


def talk(row: dict[str, Any]) -> Conversation:
    example = example_of(row, recognise(row, None, {}, "train.jsonl:1"), has_template=True)
    assert isinstance(example, Conversation)
    return example


def test_sharegpt_and_openai_write_tools_as_the_same_conversation() -> None:
    assert talk(SHAREGPT) == talk(OPENAI)


WRITTEN = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>{IM_END}"
LLAMA = '{"name": "weather", "parameters": {"town": "Kyoto"}}' + EOT


@pytest.mark.parametrize(
    ("name", "trained", "way"),
    [
        ("qwen2_5", [WRITTEN, f"No, the sun shines.{IM_END}"], "patched template"),
        ("qwen3", [WRITTEN, f"<think>\n\n</think>\n\nNo, the sun shines.{IM_END}"], "patched template"),
        ("llama3_1", [LLAMA, f"No, the sun shines.{EOT}"], "sentinels"),
    ],
)
def test_calls_of_tools_are_trained_and_their_results_are_not(
    name: str, trained: list[str], way: str, tokenizer: Any
) -> None:
    """T6, T50: ShareGPT with tools."""
    own = published(name, tokenizer)
    for template, wanted in ((own, way), (replace(own, patched=()), "sentinels")):
        found, row = encode(talk(SHAREGPT), template, tokenizer)
        assert found.way == wanted
        assert runs(row, tokenizer) == trained
        assert "The weather of a town." in found.text


def test_the_named_qwen_template_writes_tools_as_qwen3_does(tokenizer: Any) -> None:
    found, row = encode(talk(SHAREGPT), chat.choose("qwen", tokenizer), tokenizer)
    assert runs(row, tokenizer) == [WRITTEN, f"No, the sun shines.{IM_END}"]
    theirs, _ = encode(talk(SHAREGPT), published("qwen3", tokenizer), tokenizer)
    assert found.text == theirs.text.replace("<think>\n\n</think>\n\n", "")


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_a_template_without_a_place_for_tools_refuses_the_row(name: str, tokenizer: Any) -> None:
    with pytest.raises(RowError, match=r"does not write tools\[0\] of the row|gemma has no role"):
        chat.render(talk(SHAREGPT), chat.choose(name, tokenizer))


def test_a_call_that_the_template_leaves_out_refuses_the_row(tokenizer: Any) -> None:
    without_tools = {"conversations": SHAREGPT["conversations"]}
    with pytest.raises(RowError, match="leaves out calls"):
        chat.render(talk(without_tools), named("model", CHATML, tokenizer))


BAD_TOOLS: dict[str, tuple[dict[str, Any], str]] = {
    "tools not JSON": (SHAREGPT | {"tools": "weather()"}, "invalid JSON: column 'tools'"),
    "tool without name": (SHAREGPT | {"tools": [{"description": "x"}]}, "not a tool: column 'tools'[0]"),
    "call not JSON": (
        {"conversations": [SHAREGPT["conversations"][0], {"from": "function_call", "value": "weather()"}]},
        "invalid JSON: conversations[1].value",
    ),
    "arguments no object": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "x", "arguments": "[1]"}}]},
            ]
        },
        "not a tool call: messages[1].tool_calls[0].arguments is list",
    ),
    "user calls": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
        "roles out of order: messages[0] is user",
    ),
}


@pytest.mark.parametrize(("row", "what"), BAD_TOOLS.values(), ids=BAD_TOOLS)
def test_tools_and_calls_that_cannot_be_read_are_named(row: dict[str, Any], what: str) -> None:
    with pytest.raises(RowError) as caught:
        talk(row)
    assert str(caught.value).startswith(what)


def weighted(*weights: Any) -> Conversation:
    messages = [
        message | ({"weight": weight} if weight is not None else {})
        for message, weight in zip(map(dict, conversation(*TURNS).messages), weights, strict=True)
    ]
    return talk({"messages": messages})


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
@pytest.mark.parametrize(
    ("weights", "train_on", "kept"),
    [
        ((None, 1, None, 1), "assistant", [0, 1]),
        ((None, 0, None, None), "assistant", [1]),
        ((None, None, None, 0), "completion", [0]),
        ((0, None, None, 0), "last", []),
        ((None, 0, None, 0), "assistant", []),
    ],
)
def test_an_answer_of_weight_0_is_read_and_not_trained(
    template: str, weights: tuple[Any, ...], train_on: str, kept: list[int], tokenizer: Any
) -> None:
    chosen = chat.choose("chatml", tokenizer) if template == "chatml" else published(template, tokenizer)
    every = runs(encode(conversation(*TURNS), chosen, tokenizer)[1], tokenizer)
    found, row = encode(weighted(*weights), chosen, tokenizer, train_on)
    assert runs(row, tokenizer) == [every[i] for i in kept]
    assert found.text == encode(conversation(*TURNS), chosen, tokenizer)[0].text


def test_train_on_all_leaves_answers_of_weight_0_out(tokenizer: Any) -> None:
    _, row = encode(weighted(None, 0, None, 1), chat.choose("chatml", tokenizer), tokenizer, "all")
    untrained = [token for token, is_trained in zip(row.tokens[1:], row.trained[1:], strict=True) if not is_trained]
    assert tokenizer.decode(untrained) == f"two{IM_END}"


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ((None, 0.5, None, 1), r"weight: messages\[1\]\.weight is neither 0 \(not trained\) nor 1"),
        ((None, True, None, 1), r"messages\[1\]\.weight is neither"),
        ((1, None, None, 1), r"messages\[0\]\.weight is 1, but only answers"),
    ],
)
def test_other_weights_are_refused(weights: tuple[Any, ...], what: str) -> None:
    with pytest.raises(RowError, match=what):
        weighted(*weights)


def test_reasoning_content_is_the_thought_before_the_answer() -> None:
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    }
    assert talk(row).messages[-1]["content"] == "<think>\nc\n</think>\n\nb"


def test_a_patched_template_that_writes_one_byte_else_is_not_believed(tokenizer: Any) -> None:
    """T50: the negative control of the byte-identical render."""
    text = published("qwen3", tokenizer).text
    other = named("model", text.replace("</think>\\n\\n' + content", "</think>\\n' + content"), tokenizer)
    assert other.text != text
    assert other.patched == ()
    found, row = encode(conversation(*TURNS), replace(other, patched=PATCHED), tokenizer)
    assert found.way == "sentinels"
    assert runs(row, tokenizer) == [f"two{IM_END}", f"<think>\n\n</think>\nfour{IM_END}"]


said = st.text(alphabet="ab \n日<>{}", min_size=1, max_size=8).filter(str.strip)
answers = st.builds("{}{}".format, st.sampled_from(["", THOUGHT, "<think>\n\n</think>\n\n", "<think>x</think>"]), said)


@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.tuples(said, answers), min_size=1, max_size=3),
    system=st.none() | said,
    name=st.sampled_from(["qwen2_5", "qwen3"]),
    calls=st.booleans(),
)
def test_patched_templates_write_every_byte_of_the_published_ones(
    turns: list[tuple[str, str]], system: str | None, name: str, calls: bool, tokenizer: Any
) -> None:
    """T11, T50: and where marks can be put they find the same answers."""
    talked = conversation(*(part for turn in turns for part in turn), system=system)
    tool = talk(OPENAI)
    example = Conversation((*talked.messages, *tool.messages), tool.tools) if calls else talked
    own = published(name, tokenizer)
    found, row = encode(example, own, tokenizer)
    assert found.way == "patched template"
    by_marks, other = encode(example, replace(own, patched=()), tokenizer)
    assert replace(by_marks, way=found.way) == found
    assert other.trained.tolist() == row.trained.tolist()
