"""Qwen's chat templates (after Qwen2.5 and Qwen3, Apache-2.0, Alibaba Cloud) with markers around the assistant's part.

Apart from the markers ``QWEN2_5`` and ``QWEN3`` write, byte for byte, what the models' own templates write.
"""

# How the model is told about its tools.
_SIGNATURES = (
    "{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}"
    "{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}"
    "{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}"
    '{{- \'{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}'
)

_CALL = (
    '{{- \'<tool_call>\\n{"name": "\' }}{{- call.name }}{{- \'", "arguments": \' }}'
    "{{- call.arguments if call.arguments is string else call.arguments | tojson }}"
    "{{- '}\\n</tool_call>' }}"
)

_RESULT = """\
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN2_5 = (
    """\
{%- set head = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- if messages[0].role == 'system' %}
    {%- set head = messages[0].content %}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + head + '\\n\\n' }}
"""
    + _SIGNATURES
    + """\
{%- else %}
    {{- '<|im_start|>system\\n' + head + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' and not message.tool_calls %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content }}
            {%- for tool_call in message.tool_calls %}
                {%- set call = tool_call.function if tool_call.function is defined else tool_call %}
                {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
"""
    + _CALL
    + """\
            {%- endfor %}
            {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
"""
    + _RESULT
)

QWEN3 = (
    """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
"""
    + _SIGNATURES
    + """\
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set state = namespace(question=messages | length - 1, is_found=false) %}
{%- for message in messages[::-1] %}
    {%- set is_result = message.content.startswith('<tool_response>') %}
    {%- set is_result = is_result and message.content.endswith('</tool_response>') %}
    {%- if not state.is_found and message.role == 'user' and not is_result %}
        {%- set state.is_found = true %}
        {%- set state.question = messages | length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- set start = '' %}
        {%- if loop.index0 > state.question and (loop.last or thought) %}
            {%- set start = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' %}
            {%- set content = content.lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- start + content }}
            {%- for tool_call in message.tool_calls or [] %}
                {%- set call = tool_call.function if tool_call.function is defined else tool_call %}
                {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
"""
    + _CALL
    + """\
            {%- endfor %}
            {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
"""
    + _RESULT
)

QWEN = QWEN3.replace("(loop.last or thought)", "thought")
"""As Qwen3, but an answer without a thought gets no empty one."""
