"""What is rendered, what is trained: golden masks, BOS and EOS, boundaries, templates that rewrite or misbehave."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data import chat
from job.data.encode import Encoded, Encoder
from job.data.formats import PlainText, example_of, recognise
from job.data.row_error import RowError
from job.data.templates import TEMPLATES
from job.errors import SpecInvalid
from tests.job.talking import (
    BOS,
    EOS,
    EOT,
    HEAD,
    HEAD_END,
    SPECIAL,
    TURN,
    TURN_END,
    conversation,
    encode,
    fast,
    named,
    runs,
)
from tests.job.tiny import CHATML, IM_END, IM_START, tokenizer_of


@pytest.fixture(scope="module")
def backend() -> Any:
    return tokenizer_of(SPECIAL)


@pytest.fixture
def tokenizer(backend: Any) -> Any:
    return fast(backend)


TWO_TURNS = conversation("What is 1+1?", "two", "And 2+2?", "four", system="Be brief.")

GOLDEN = {
    "chatml": (
        f"{IM_START}system\nBe brief.{IM_END}\n{IM_START}user\nWhat is 1+1?{IM_END}\n{IM_START}assistant\ntwo{IM_END}\n"
        f"{IM_START}user\nAnd 2+2?{IM_END}\n{IM_START}assistant\nfour{IM_END}\n",
        [f"two{IM_END}", f"four{IM_END}"],
    ),
    "qwen": (
        f"{IM_START}system\nBe brief.{IM_END}\n{IM_START}user\nWhat is 1+1?{IM_END}\n{IM_START}assistant\ntwo{IM_END}\n"
        f"{IM_START}user\nAnd 2+2?{IM_END}\n{IM_START}assistant\nfour{IM_END}\n",
        [f"two{IM_END}", f"four{IM_END}"],
    ),
    "llama3": (
        f"{BOS}{HEAD}system{HEAD_END}\n\nBe brief.{EOT}{HEAD}user{HEAD_END}\n\nWhat is 1+1?{EOT}"
        f"{HEAD}assistant{HEAD_END}\n\ntwo{EOT}{HEAD}user{HEAD_END}\n\nAnd 2+2?{EOT}"
        f"{HEAD}assistant{HEAD_END}\n\nfour{EOT}",
        [f"two{EOT}", f"four{EOT}"],
    ),
    "gemma": (
        f"{BOS}{TURN}user\nBe brief.\n\nWhat is 1+1?{TURN_END}\n{TURN}model\ntwo{TURN_END}\n"
        f"{TURN}user\nAnd 2+2?{TURN_END}\n{TURN}model\nfour{TURN_END}\n",
        [f"two{TURN_END}", f"four{TURN_END}"],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_named_templates_render_and_mask_as_published(name: str, tokenizer: Any) -> None:  # T6
    text, trained = GOLDEN[name]
    rendered, row = encode(TWO_TURNS, chat.choose(name, tokenizer), tokenizer)
    assert rendered.text == tokenizer.decode(row.tokens) == text
    assert runs(row, tokenizer) == trained
    assert rendered.way == "markers"
    assert tokenizer.decode(row.prompt) == text[: text.rindex("four")]


@pytest.mark.parametrize("name", GOLDEN)
def test_patched_templates_and_sentinels_find_what_markers_say(name: str, tokenizer: Any) -> None:  # T50
    text = TEMPLATES[name].text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    own = named("model", text, tokenizer)
    marked, by_markers = encode(TWO_TURNS, chat.choose(name, tokenizer), tokenizer)
    assert marked.way == "markers"
    for template, way in ((own, "patched template"), (replace(own, patched=()), "sentinels")):
        found, row = encode(TWO_TURNS, template, tokenizer)
        assert found == replace(marked, way=way)
        assert row.trained.tolist() == by_markers.trained.tolist()


def test_without_template_the_completion_and_one_eos_are_trained(tokenizer: Any) -> None:  # T6, T9
    _, row = encode(PlainText("What is 1+1?", " two"), None, tokenizer)
    assert tokenizer.decode(row.tokens) == f"What is 1+1? two{EOS}"
    assert runs(row, tokenizer) == [f" two{EOS}"]


def test_alpaca_without_template_trains_the_response_only(tokenizer: Any) -> None:  # T6
    values = {"instruction": "Add.", "input": "1 2", "output": "three"}
    _, row = encode(example_of(values, recognise(values, None, {}, "x:1"), has_template=False), None, tokenizer)
    assert tokenizer.decode(row.tokens).endswith(f"### Response:\nthree{EOS}")
    assert runs(row, tokenizer) == [f"three{EOS}"]


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("assistant", [f"two{IM_END}", f"four{IM_END}"]),
        ("completion", [f"two{IM_END}", f"four{IM_END}"]),
        ("last", [f"four{IM_END}"]),
    ],
)
def test_train_on_chooses_the_answers(train_on: str, wanted: list[str], tokenizer: Any) -> None:
    _, row = encode(TWO_TURNS, chat.choose("chatml", tokenizer), tokenizer, train_on)
    assert runs(row, tokenizer) == wanted


def test_train_on_all_trains_every_token_but_the_first(tokenizer: Any) -> None:
    _, row = encode(TWO_TURNS, chat.choose("chatml", tokenizer), tokenizer, "all")
    assert not row.trained[0]
    assert row.trained[1:].all()


@pytest.mark.parametrize("tokenizer_adds", [False, True])
@pytest.mark.parametrize("template_adds", [False, True])
def test_exactly_one_bos_if_anyone_adds_one(tokenizer_adds: bool, template_adds: bool, backend: Any) -> None:  # T8
    tokenizer = fast(backend, adds_bos=tokenizer_adds)
    template = named("model", ("{{ bos_token }}" if template_adds else "") + CHATML, tokenizer)
    _, row = encode(TWO_TURNS, template, tokenizer)
    wanted = int(tokenizer_adds or template_adds)
    for tokens in (row.tokens.tolist(), row.prompt.tolist()):
        assert tokens.count(tokenizer.bos_token_id) == wanted
        assert tokens[:wanted] == [tokenizer.bos_token_id] * wanted
    assert runs(row, tokenizer) == [f"two{IM_END}", f"four{IM_END}"]


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("completion", ["two", f"two{EOS}"])
def test_plain_text_ends_with_exactly_one_eos(adds_eos: bool, completion: str, backend: Any) -> None:  # T9
    tokenizer = fast(backend, adds_bos=True, adds_eos=adds_eos, pad_token=EOS)
    _, row = encode(PlainText("1+1=", completion), None, tokenizer)
    assert row.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert row.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert runs(row, tokenizer) == [f"two{EOS}"]


BOUNDARIES = [
    ("Say\n", "\nyes"),
    ("Now, Say", "ing it"),
    ("Say ", " yes"),
    ("It is", " "),
    ("日", "本"),
    ("", "yes"),
    ("e\u0301", "!"),
]


@pytest.mark.parametrize(("prompt", "completion"), BOUNDARIES)
def test_every_token_that_touches_the_answer_is_trained(prompt: str, completion: str, tokenizer: Any) -> None:  # T10
    tokenizer.backend_tokenizer.add_tokens(["\n\n", "Saying"])
    _, row = encode(PlainText(prompt, completion), None, tokenizer)
    assert tokenizer.decode(row.tokens) == f"{prompt}{completion}{EOS}"
    read_so_far = [len(tokenizer.decode(row.tokens[: i + 1])) for i in range(len(row.tokens))]
    # The very first token is never trained: nothing before it could predict it.
    assert row.trained.tolist() == [False, *(length > len(prompt) for length in read_so_far[1:])]


def test_a_tokenizer_that_joins_line_ends_over_the_boundary_trains_the_joint(backend: Any) -> None:
    """T10: the ids of the prompt are no prefix of those of the row, as with Qwen's and Llama 3's splitting."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    own = Tokenizer.from_str(backend.to_str())
    split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer = fast(own)
    _, row = encode(PlainText("Instruction:\n", "\nResponse"), None, tokenizer)
    prompt = tokenizer("Instruction:\n")["input_ids"]
    assert row.tokens[: len(prompt)].tolist() != prompt
    assert runs(row, tokenizer) == [f"\n\nResponse{EOS}"]


def test_a_token_across_the_boundary_is_trained(tokenizer: Any) -> None:  # T10
    tokenizer.backend_tokenizer.add_tokens(["\n\n"])
    rendered, row = encode(PlainText("Say\n", "\nyes"), None, tokenizer)
    assert runs(row, tokenizer) == [f"\n\nyes{EOS}"]
    assert rendered.prompt == "Say\n"
    assert row.tokens[: len(row.prompt)].tolist() != row.prompt.tolist()


THINKING = """{%- for m in messages -%}
{%- set content = m['content'] -%}
{%- if m['role'] == 'assistant' and not loop.last -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- elif m['role'] == 'assistant' and '</think>' not in content -%}
{%- set content = '<think>\\n\\n</think>\\n\\n' + content -%}
{%- endif -%}
{{- '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""As Qwen3 does it: thoughts of earlier turns are dropped, and a last turn without one gets an empty one."""


def test_a_template_that_rewrites_history_is_masked_in_one_render(tokenizer: Any) -> None:  # T11
    thought = "<think>\nhm\n</think>\n\n"
    rendered, row = encode(
        conversation("a?", f"{thought}one", "b?", f"{thought}two"), named("model", THINKING, tokenizer), tokenizer
    )
    assert "hm" not in rendered.text[: rendered.text.index("one")]
    assert runs(row, tokenizer) == [f"one{IM_END}", f"{thought}two{IM_END}"]
    assert rendered.answer == f"{thought}two"


def test_what_follows_the_prompt_is_for_the_model_to_write(tokenizer: Any) -> None:  # T11
    rendered, row = encode(conversation("a?", "one", "b?", "two"), named("model", THINKING, tokenizer), tokenizer)
    assert runs(row, tokenizer) == [f"one{IM_END}", f"<think>\n\n</think>\n\ntwo{IM_END}"]
    assert rendered.text.startswith(rendered.prompt)


def test_the_named_qwen_template_drops_earlier_thoughts_too(tokenizer: Any) -> None:
    thought = "<think>\nhm\n</think>\n\n"
    _, row = encode(
        conversation("a?", f"{thought}one", "b?", f"{thought}two"), chat.choose("qwen", tokenizer), tokenizer
    )
    assert runs(row, tokenizer) == [f"one{IM_END}", f"{thought}two{IM_END}"]


@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["chatml", "thinking"])
def test_an_end_of_turn_may_be_an_ordinary_added_token(template: str) -> None:  # T7
    ordinary = fast(tokenizer_of([EOS, BOS]))
    ordinary.add_tokens([IM_START, IM_END, "</tool_call>"])
    assert IM_END not in ordinary.all_special_tokens
    example = conversation("a?", "one", "b?", "<tool_call>two</tool_call>")
    rendered, row = encode(example, named("model", template, ordinary), ordinary)
    assert rendered.ending == IM_END
    assert rendered.answer.endswith("two</tool_call>")
    assert runs(row, ordinary)[-1].endswith(f"two</tool_call>{IM_END}")


STYLES = {
    "llama2": (
        "{%- for m in messages %}{%- if m['role'] == 'user' %}"
        "{{- bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{%- else %}{{- ' ' + m['content'] | trim + ' ' + eos_token }}{%- endif %}{%- endfor %}",
        [f" two {EOS}", f" four {EOS}"],
        [f"two {EOS}", f"four {EOS}"],
    ),
    "zephyr": (
        "{%- for m in messages %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}",
        [f"two{EOS}", f"four{EOS}"],
        [f"two{EOS}", f"four{EOS}"],
    ),
    "no end of turn": (
        "{%- for m in messages %}{{- m['role'] + ': ' + m['content'] + '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}",
        [" two", " four"],
        ["two", "four"],
    ),
}


@pytest.mark.parametrize(("text", "loose", "strict"), STYLES.values(), ids=STYLES)
def test_other_styles_are_masked_by_sentinels(text: str, loose: list[str], strict: list[str], tokenizer: Any) -> None:
    rendered, row = encode(
        conversation("a?", "two", "b?", "four"), named("model", text, tokenizer), tokenizer, "assistant"
    )
    assert rendered.way == "sentinels"
    for found, either in zip(runs(row, tokenizer), zip(loose, strict, strict=True), strict=True):
        assert found in either


REWRITERS = {
    "upper": "{%- for m in messages %}{{- m['content'] | upper }}{%- endfor %}",
    "dropped": "{%- for m in messages if m['role'] == 'user' %}{{- m['content'] }}{%- endfor %}",
    "twice": "{%- for m in messages %}{{- m['content'] + m['content'] }}{%- endfor %}",
    "cut": "{%- for m in messages %}{{- m['content'][:2] }}{%- endfor %}",
}


@pytest.mark.parametrize("text", REWRITERS.values(), ids=REWRITERS)
def test_answers_that_cannot_be_found_are_refused(text: str, tokenizer: Any) -> None:  # T50
    with pytest.raises(RowError, match="rewrites answers"):
        chat.render(conversation("hello", "world"), named("model", text, tokenizer))


def test_markers_in_the_wrong_place_are_not_believed(tokenizer: Any) -> None:  # T50
    text = CHATML.replace(
        "{{- '<|im_start|>'", "{%- generation %}{{- '' }}{{- 'x' }}{%- endgeneration %}{{- '<|im_start|>'"
    )
    rendered, row = encode(conversation("a?", "two"), named("model", text, tokenizer), tokenizer)
    assert rendered.way == "sentinels"
    assert runs(row, tokenizer) == [f"two{IM_END}"]


HOSTILE = {
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "endless range": "{% for i in range(10**12) %}x{% endfor %}",
    "changes its input": "{% set _ = messages.append(1) %}",
    "refuses": "{{ raise_exception('roles must alternate') }}",
    "divides by zero": "{{ 1 / 0 }}",
    "no such filter at run time": "{{ messages[99]['content'] + 1 }}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_broken_template_is_refused_by_the_row(text: str, tokenizer: Any) -> None:
    with pytest.raises(RowError, match="refused by the chat template"):
        chat.render(conversation("hello", "world"), named("model", text, tokenizer))


def test_the_date_in_a_template_never_changes(tokenizer: Any) -> None:
    text = "{{- strftime_now('%d %b %Y') }}" + CHATML
    assert chat.render(conversation("a", "b"), named("model", text, tokenizer)).text.startswith(
        "26 Jul 2024<|im_start|>"
    )


class TestChoosing:
    def test_left_out_it_is_the_models_own_or_none(self, tokenizer: Any) -> None:
        assert chat.choose(None, tokenizer) is None
        assert named("model", CHATML, tokenizer).name == "model"
        assert chat.choose("none", tokenizer) is None

    def test_a_model_with_several_uses_its_default(self, tokenizer: Any) -> None:
        tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
        template = chat.choose(None, tokenizer)
        assert template is not None
        assert template.text == CHATML
        tokenizer.chat_template = {"rag": "x", "tool_use": "x"}
        with pytest.raises(SpecInvalid, match="rag, tool_use"):
            chat.choose(None, tokenizer)

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_a_named_one_needs_its_tokens(self, name: str) -> None:
        bare = fast(tokenizer_of([EOS, BOS]))
        with pytest.raises(
            SpecInvalid, match=rf"{name} needs the tokens .*{TEMPLATES[name].end_of_turn[:5].strip('<|')}"
        ):
            chat.choose(name, bare)

    def test_a_file_is_read_and_an_unknown_name_lists_the_names(self, tmp_path: Path, tokenizer: Any) -> None:
        (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
        template = chat.choose(str(tmp_path / "mine.jinja"), tokenizer)
        assert template is not None
        assert template.text == CHATML
        with pytest.raises(SpecInvalid, match=r"'vicuna' is none of chatml, llama3, gemma, qwen, none, FILE\.jinja"):
            chat.choose("vicuna", tokenizer)
        with pytest.raises(SpecInvalid, match=r"absent\.jinja cannot be read"):
            chat.choose("absent.jinja", tokenizer)

    def test_a_template_that_does_not_parse_is_refused(self, tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for %}"
        with pytest.raises(SpecInvalid, match="not a valid template"):
            chat.choose(None, tokenizer)


words = st.text(alphabet="ab \n\t日é😀<|>", min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=3),
    name=st.sampled_from(["chatml", "llama3", "gemma", "qwen"]),
    keep_markers=st.booleans(),
)
def test_whatever_is_said_the_answers_are_trained_and_nothing_else(
    turns: list[tuple[str, str]], name: str, keep_markers: bool, backend: Any
) -> None:
    tokenizer = fast(backend)
    text = TEMPLATES[name].text
    if not keep_markers:
        text = text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    template = named("model", text, tokenizer)
    rendered, row = encode(conversation(*(part for turn in turns for part in turn)), template, tokenizer)
    answers = [answer.strip() for _, answer in turns]
    spans = [rendered.text[start:end] for start, end in rendered.answers]
    assert [span.removesuffix(TEMPLATES[name].end_of_turn).strip() for span in spans] == answers
    assert rendered.text.startswith(rendered.prompt)
    for run, span in zip(runs(row, tokenizer), spans, strict=True):
        # White space of the template may share its token with the answer's first characters.
        assert run.endswith(span)
        assert not run.removesuffix(span).strip()


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(st.tuples(words, words.filter(lambda text: text[0] in "ab日é")), min_size=1, max_size=3),
    name=st.sampled_from(["chatml", "gemma", "qwen"]),
    adds_bos=st.booleans(),
)
def test_the_served_prompt_is_the_beginning_of_what_was_trained(  # T8
    turns: list[tuple[str, str]], name: str, adds_bos: bool, backend: Any
) -> None:
    tokenizer = fast(backend, adds_bos=adds_bos)
    example = conversation(*(part for turn in turns for part in turn))
    _, row = encode(example, chat.choose(name, tokenizer), tokenizer)
    tokenizer.chat_template = TEMPLATES[name].text
    served = tokenizer.apply_chat_template(list(example.messages[:-1]), add_generation_prompt=True, return_dict=False)
    own = [tokenizer.bos_token_id] if adds_bos and name != "gemma" else []
    assert row.prompt.tolist() == own + served
    assert row.tokens[: len(row.prompt)].tolist() == row.prompt.tolist()
    assert not row.trained[: len(row.prompt)][-1]


class TestCutting:
    @pytest.fixture
    def row(self, backend: Any) -> tuple[Encoder, Encoded]:
        tokenizer = fast(backend, adds_bos=True)
        encoder = Encoder(tokenizer, "assistant")
        return encoder, encoder.encode([(chat.plain("a b c d e f g h", "two"), True)])[0]

    def test_the_end_is_cut_without_a_new_eos(self, row: tuple[Encoder, Encoded]) -> None:  # T12
        encoder, whole = row
        cut = encoder.cut_end(whole, len(whole.tokens) - 1)
        assert cut.tokens.tolist() == whole.tokens.tolist()[:-1]
        assert cut.supervised == whole.supervised - 1

    def test_the_prompt_is_cut_after_bos_and_the_answer_stays(self, row: tuple[Encoder, Encoded]) -> None:  # T12
        encoder, whole = row
        cut = encoder.cut_prompt(whole, len(whole.tokens) - 4)
        assert cut is not None
        assert cut.tokens.tolist() == [whole.tokens[0], *whole.tokens[5:].tolist()]
        assert cut.prompt.tolist() == [whole.prompt[0], *whole.prompt[5:].tolist()]
        assert cut.supervised == whole.supervised

    def test_an_answer_too_long_by_itself_is_not_cut(self, row: tuple[Encoder, Encoded]) -> None:
        encoder, whole = row
        assert encoder.cut_prompt(whole, whole.supervised + 1) is not None
        assert encoder.cut_prompt(whole, whole.supervised) is None


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(SpecInvalid, match="ByT5Tokenizer is a slow tokenizer"):
        Encoder(ByT5Tokenizer(), "assistant")
