"""The chat templates that `chat_template` can name, in the forms that models were trained on."""

from __future__ import annotations

_ASSISTANT = "{% if add_generation_prompt %}"

# ChatML, as in OpenAI's and Qwen's models.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}" + _ASSISTANT + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Llama 3: no line break after <|eot_id|>.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}" + _ASSISTANT + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
# Mistral's first form, with spaces inside of [INST]; the system's message begins the user's first.
MISTRAL = (
    "{{ bos_token }}"
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set rest = messages[1:] if system else messages %}"
    "{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system + '\\n\\n' if system and loop.first else '')"
    " + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Stanford Alpaca, for several turns.
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}" + _ASSISTANT + "{{ '### Response:\\n' }}{% endif %}"
)
# EXAONE 3: a system's message is always there; turns of the system and of the assistant end.
EXAONE = (
    "{% if messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{% if message['role'] != 'user' %}{{ '[|endofturn|]' }}{% endif %}{{ '\\n' }}{% endfor %}"
    + _ASSISTANT
    + "{{ '[|assistant|]' }}{% endif %}"
)

BY_NAME = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "exaone": EXAONE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}
