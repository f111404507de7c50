"""Chat templates for models that bring none, with markers around what the assistant writes."""

from typing import NamedTuple


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

# As Qwen does it: reasoning stays in answers after the last question only, tool results are the user's.
_QWEN = """\
{%- set state = namespace(last_question=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set state.last_question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if loop.index0 < state.last_question %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TEMPLATES: dict[str, Named] = {
    "chatml": Named(_CHATML, "<|im_end|>", ("<|im_end|>", "<|im_start|>")),
    "llama3": Named(_LLAMA3, "<|eot_id|>", ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")),
    "gemma": Named(_GEMMA, "<end_of_turn>", ("<end_of_turn>", "<start_of_turn>")),
    "qwen": Named(_QWEN, "<|im_end|>", ("<|im_end|>", "<|im_start|>")),
}
