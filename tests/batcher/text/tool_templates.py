"""Short chat templates that treat tools as families of models do, with their peculiarities."""

from __future__ import annotations

from headrace.batcher.tools.families import Family

CHATML_START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# Like Qwen 2.5: tools in the system message, results inside messages of the user.
QWEN_25 = (
    "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'You are helpful.' }}"
    "{% if tools %}\n\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n"
    'Call with\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>{% endif %}<|im_end|>\n'
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) or "
    "(m.role == 'assistant' and not m.tool_calls) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{% if call.function is defined %}{% set call = call.function %}{% endif %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "<|im_start|>user{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}"
    "{% endfor %}" + CHATML_START
)
# Like Qwen 3: it also shows what the model thought since the last question, and searches contents for it.
QWEN_3 = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call>\n</tool_call><|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role in ('user', 'system') %}<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set thoughts = '' %}"
    "{% if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and thoughts %}<think>\n{{ thoughts.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}{% for call in m.tool_calls or [] %}{{ '\n' if loop.index0 or content }}<tool_call>\n"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>user\n<tool_response>\n{{ content }}\n</tool_response><|im_end|>\n"
    "{% endif %}{% endfor %}" + CHATML_START
)
# Like Hermes: a tool needs a description, and a result the tool's name.
HERMES = (
    "{{ bos_token }}{% if tools %}<tools> {% for tool in tools %}"
    "{{ tool.function.name + ' - ' + tool.function.description }} {{ tool.function.parameters | tojson }}"
    "{% endfor %} </tools> <tool_call>\n</tool_call><|im_end|>{% endif %}{% for m in messages %}"
    "{% if m.role in ('user', 'system') or (m.role == 'assistant' and m.tool_calls is not defined) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{% for call in m.tool_calls %}"
    '\n<tool_call>\n{"arguments": {{ call.function.arguments | tojson }}, '
    '"name": "{{ call.function.name }}"}\n</tool_call> {% endfor %}<|im_end|>\n'
    "{% else %}{% if not m.name is defined %}{{ raise_exception('a result needs a name') }}{% endif %}"
    '<|im_start|>tool\n<tool_response>\n{"name": "{{ m.name }}", "content": {{ m.content | tojson }}}\n'
    "</tool_response> <|im_end|>\n{% endif %}{% endfor %}" + CHATML_START
)
# Like Llama 3.1: tools in the first message of the user, one call per message, and no text beside it.
LLAMA_31 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|im_start|>system\n\n{% if tools is not none %}Environment: ipython\n{% endif %}{{ system }}<|im_end|>"
    "{% if tools is not none %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "<|im_start|>user\n\nRespond in the format "
    '{{ \'{"name": function name, "parameters": dictionary of argument name and its value}.\' }}\n'
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{{ first }}<|im_end|>{% endif %}"
    "{% for m in messages %}"
    "{% if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|im_start|>assistant\n\n"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}{{ call.arguments | tojson }}'
    "{{ '}' }}<|im_end|>"
    "{% else %}<|im_start|>ipython\n\n{{ {'output': m.content} | tojson }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Like Mistral 7B v0.3: ids of nine characters, tools before the last question, no text beside calls.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest | rejectattr('role', 'equalto', 'tool') | selectattr('tool_calls', 'undefined') %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools is not none and m == asked[-1] %}[AVAILABLE_TOOLS] [{% for tool in tools %}"
    '{{ \'{"type": "function", "function": {\' }}{% for key, value in tool.function.items() %}'
    "{{ '\"' + key + '\": ' }}{{ value | tojson }}{{ ', ' if not loop.last else '}}' }}{% endfor %}"
    "{{ ', ' if not loop.last else ']' }}{% endfor %}[/AVAILABLE_TOOLS]{% endif %}[INST] "
    "{% if m == asked[-1] and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    "{% set out = call.function | tojson %}{{ out[:-1] }}"
    "{% if not call.id is defined or call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ ', \"id\": \"' + call.id + '\"}' }}{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content | string + ', ' }}"
    "{% if not m.tool_call_id is defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ '\"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
# Like DeepSeek V3: arguments are JSON, and only a message without a content (none, not empty) has calls.
DEEPSEEK = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.content is none %}{% for call in m.tool_calls %}"
    "{{ '<|im_start|>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<|im_end|>' }}"
    "{% endfor %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}" + CHATML_START
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}" + CHATML_START
)
# Like Gemma 2: no system messages, and the user and the model alternate.
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)

TEMPLATES = {
    "qwen 2.5": (QWEN_25, Family.HERMES),
    "qwen 3": (QWEN_3, Family.HERMES),
    "hermes": (HERMES, Family.HERMES),
    "llama 3.1": (LLAMA_31, Family.LLAMA3),
    "mistral": (MISTRAL, Family.MISTRAL),
    "chatml": (CHATML, Family.JSON),
    "gemma 2": (GEMMA_2, Family.JSON),
}
