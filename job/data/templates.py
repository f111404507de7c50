"""Chat templates for models that bring none, with markers around what the assistant writes."""

from typing import NamedTuple

from job.data.qwen import QWEN, QWEN2_5, QWEN3


class Named(NamedTuple):
    """A template one can ask for by name."""

    text: str
    end_of_turn: str
    control_tokens: tuple[str, ...]
    """Tokens it writes that the tokenizer must have, the end of turn first."""


_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{%- if bos_token is defined %}
    {{- bos_token }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if role == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Gemma has neither a system nor a tool role: the former stands at the head of the first question.
_GEMMA = """\
{%- if bos_token is defined %}
    {{- bos_token }}
{%- endif %}
{%- set state = namespace(head='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set state.head = message['content'] | trim + '\\n\\n' %}
    {%- elif message['role'] == 'assistant' %}
        {{- '<start_of_turn>model\\n' }}
        {%- generation %}
            {{- message['content'] | trim + '<end_of_turn>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '<start_of_turn>user\\n' + state.head + message['content'] | trim + '<end_of_turn>\\n' }}
        {%- set state.head = '' %}
    {%- else %}
        {{- raise_exception('gemma has no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

TEMPLATES: dict[str, Named] = {
    "chatml": Named(_CHATML, "<|im_end|>", ("<|im_end|>", "<|im_start|>")),
    "llama3": Named(_LLAMA3, "<|eot_id|>", ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")),
    "gemma": Named(_GEMMA, "<end_of_turn>", ("<end_of_turn>", "<start_of_turn>")),
    "qwen": Named(QWEN, "<|im_end|>", ("<|im_end|>", "<|im_start|>")),
}

PATCHED = (QWEN3, QWEN2_5, *(named.text for named in TEMPLATES.values()))
"""Published templates with markers added and nothing else changed. A model whose own template has no markers is
rendered with both; where the bytes are the same, the markers of the patched one say what is trained."""
