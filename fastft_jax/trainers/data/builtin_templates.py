"""Chat templates for tokenizers that have none, by name.

`zephyr` is the one for any tokenizer: its turns end with the tokenizer's own end-of-sequence token, so generation
stops where a turn ends. The others need their marker tokens to be in the vocabulary to be worth their name.
Rendered by transformers: blocks are trimmed, so a line with nothing but a {% tag %} leaves no trace.
"""

# Tools as most open models learn them: signatures in the system turn, calls as JSON between tags. Thoughts are kept.
_TOOLS = """\
{%- macro tool_text() -%}
You may call the functions listed here, one JSON description a line.
<tools>
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
</tools>
To call one, write its name and arguments as JSON between tags:
<tool_call>
{"name": <function name>, "arguments": <JSON object>}
</tool_call>
{%- endmacro %}
{%- macro body(message) -%}
{%- if message.reasoning_content -%}
{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif -%}
{{- message.content }}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{ '' if loop.first and not message.content else '\\n' }}<tool_call>
{"name": {{ call.name | tojson }}, "arguments": {{ call.arguments | tojson }}}
</tool_call>
{%- endfor -%}
{%- endmacro %}
{%- if tools -%}
{%- set first = messages[0] -%}
{%- if first.role == 'system' -%}
{%- set preamble = first.content + '\\n\\n' + tool_text() -%}
{%- set messages = messages[1:] -%}
{%- else -%}
{%- set preamble = tool_text() -%}
{%- endif -%}
{%- endif -%}
"""

_CHATML = (
    _TOOLS
    + """\
{%- if tools -%}
{{ '<|im_start|>system\\n' + preamble + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + body(message) + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
)

_ZEPHYR = (
    _TOOLS
    + """\
{{- bos_token -}}
{%- if tools -%}
{{ '<|system|>\\n' + preamble + eos_token + '\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ '<|user|>\\n<tool_response>\\n' + message.content + '\\n</tool_response>' + eos_token + '\\n' }}
{%- else -%}
{{ '<|' + message.role + '|>\\n' + body(message) + eos_token + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>\\n' }}
{%- endif -%}
"""
)

_LLAMA_3 = (
    _TOOLS
    + """\
{{- bos_token -}}
{%- if tools -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + preamble + '<|eot_id|>' }}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'ipython' if message.role == 'tool' else message.role -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + body(message) | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""
)

# The next ones know no tools and say so.
_PLAIN_ROLES = """\
{%- if tools -%}{{ raise_exception('this chat template has no place for tools') }}{%- endif -%}
{%- for message in messages if message.role == 'tool' or message.tool_calls -%}
{{ raise_exception('this chat template has no place for tool_calls and their results') }}
{%- endfor -%}
"""

# Mistral and Gemma have no system turn: its text goes before the first user's.
_SYSTEM_IN_FIRST_USER = (
    _PLAIN_ROLES
    + """\
{%- set ns = namespace(system='', n=0) -%}
{%- if messages[0].role == 'system' -%}
{%- set ns.system = messages[0].content + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{ raise_exception('roles must alternate user, assistant, user, ... after an optional system message') }}
{%- endif -%}
"""
)

_MISTRAL = (
    _SYSTEM_IN_FIRST_USER
    + """\
{%- if message.role == 'user' -%}
{{ '[INST] ' + (ns.system if loop.first else '') + message.content + ' [/INST]' }}
{%- else -%}
{{ ' ' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

_GEMMA = (
    _SYSTEM_IN_FIRST_USER
    + """\
{%- if message.role == 'user' -%}
{{ '<start_of_turn>user\\n' + (ns.system if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- else -%}
{{ '<start_of_turn>model\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
)

_PHI_3 = (
    _PLAIN_ROLES
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>\\n' }}
{%- endif -%}
"""
)

_ALPACA = (
    _PLAIN_ROLES
    + """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{ messages[0].content + '\\n\\n' }}
{%- set messages = messages[1:] -%}
{%- else -%}
{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' -%}
{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- else -%}
{{ raise_exception('only one system message, at the start, then user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""
)

_VICUNA = (
    _PLAIN_ROLES
    + """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{ messages[0].content + ' ' }}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ 'USER: ' + message.content + ' ' }}
{%- elif message.role == 'assistant' -%}
{{ 'ASSISTANT: ' + message.content + eos_token }}
{%- else -%}
{{ raise_exception('only one system message, at the start, then user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'ASSISTANT:' }}
{%- endif -%}
"""
)

BUILTIN_TEMPLATES = {
    "zephyr": _ZEPHYR,
    "chatml": _CHATML,
    "llama-3": _LLAMA_3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi-3": _PHI_3,
    "alpaca": _ALPACA,
    "vicuna": _VICUNA,
}
