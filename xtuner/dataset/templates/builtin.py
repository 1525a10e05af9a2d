"""Built-in prompt templates as data. To add one, add an entry; `templates.template` explains the fields."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.templates.internlm import FirstReleaseTemplate
from xtuner.dataset.templates.template import TRAIN_ON, Piece, Template, Turn, token_id
from xtuner.errors import ConfigError, nearest
from xtuner.registry import TEMPLATES, registered
from xtuner.utils.fields import shown

__all__ = ['TEMPLATES', 'TRAIN_ON', 'Piece', 'Template', 'Turn', 'get_template', 'token_id']


def _chatml(name: str, *stop: str, begin: str = '') -> Template:
    return Template(
        name,
        begin=begin,
        turns={
            'system': Turn('<|im_start|>system\n', '<|im_end|>', '\n'),
            'user': Turn('<|im_start|>user\n', '<|im_end|>', '\n'),
            'assistant': Turn('<|im_start|>assistant\n', '<|im_end|>', '\n'),
        },
        markers=('<|im_start|>', '<|im_end|>'),
        stop=('<|im_end|>', *stop),
    )


def _inst(name: str) -> Template:
    """The `[INST]` format of Mistral, which puts a system text in front of the user's."""
    return Template(
        name,
        turns={
            'system': Turn(end='\n\n'),
            'user': Turn('[INST] ', ' [/INST]'),
            'assistant': Turn(lead=' ', end='{eos}'),
        },
        markers=('[INST]', '[/INST]'),
        system_in_user=True,
        alternates=True,
    )


def _llama2(name: str) -> Template:
    return Template(
        name,
        turns={
            'system': Turn('<<SYS>>\n', '\n<</SYS>>\n\n'),
            'user': Turn('[INST] ', ' [/INST]'),
            'assistant': Turn(lead=' ', end=' {eos}'),
        },
        markers=('[INST]', '[/INST]'),
        system_in_user=True,
        alternates=True,
    )


def _vicuna(name: str) -> Template:
    return Template(
        name,
        turns={
            'system': Turn(end=' '),
            'user': Turn('USER: ', ' '),
            'assistant': Turn('ASSISTANT:', lead=' ', end='{eos}'),
        },
        default_system='A chat between a curious user and an artificial intelligence assistant. The assistant gives '
        "helpful, detailed, and polite answers to the user's questions.",
    )


def _instruction(name: str, default_system: str, answer: Turn, system_end: str = '\n\n') -> Template:
    """The Alpaca format with `### Instruction:` and `### Response:`."""
    return Template(
        name,
        turns={'system': Turn(end=system_end), 'user': Turn('### Instruction:\n', '\n\n'), 'assistant': answer},
        default_system=default_system,
    )


_TASK = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.'

_ALL = [
    Template(
        'internlm_chat',
        turns={
            'system': Turn('<|System|>:', after='\n'),
            'user': Turn('<|User|>:', '<eoh>', '\n'),
            'assistant': Turn('<|Bot|>:', '<eoa>', '\n'),
        },
        markers=('<|System|>', '<|User|>', '<|Bot|>', '<eoh>', '<eoa>'),
        stop=('<eoa>',),
    ),
    FirstReleaseTemplate(
        'internlm_chat_2023',
        turns={
            'system': Turn('<|System|>:', after='\n'),
            'user': Turn('{bos}<|User|>:', '<eoh>', '\n'),
            'assistant': Turn('<|Bot|>:', '<eoa>', '\n'),
        },
        markers=('<|System|>', '<|User|>', '<|Bot|>', '<eoh>', '<eoa>'),
        stop=('<eoa>',),
    ),
    Template(
        'internlm_chat_2024',
        turns={
            'system': Turn('<|System|>:', after='\n'),
            'user': Turn('<|User|>:', after='\n'),
            'assistant': Turn('<|Bot|>:', '<eoa>', '\n'),
        },
        markers=('<|System|>', '<|User|>', '<|Bot|>', '<eoa>'),
        stop=('<eoa>',),
    ),
    _chatml('internlm2_chat', begin='{bos}'),
    Template(
        'default',
        turns={
            'system': Turn('<|System|>:', after='\n'),
            'user': Turn('<|User|>:', after='\n'),
            'assistant': Turn('<|Bot|>:', '{eos}', '\n'),
        },
        markers=('<|System|>', '<|User|>', '<|Bot|>'),
    ),
    # No template: text between BOS and EOS, for documents and for text that is already formatted.
    Template('plain', turns={'system': Turn(), 'user': Turn(), 'assistant': Turn(end='{eos}')}),
    Template(
        'zephyr',
        begin='',
        turns={
            'system': Turn('<|system|>\n', '{eos}', '\n'),
            'user': Turn('<|user|>\n', '{eos}', '\n'),
            'assistant': Turn('<|assistant|>\n', '{eos}', '\n'),
        },
        markers=('<|system|>', '<|user|>', '<|assistant|>'),
    ),
    # MOSS writes thoughts, commands and answer itself, including markers; only users and tools interrupt it.
    Template(
        'moss_sft',
        begin='',
        turns={
            'system': Turn(after='\n'),
            'user': Turn('<|Human|>: ', '<eoh>', '\n'),
            'thoughts': Turn(lead='<|Inner Thoughts|>: ', end='<eot>', after='\n'),
            'commands': Turn(lead='<|Commands|>: ', end='<eoc>', after='\n'),
            'tool': Turn('<|Results|>: ', '<eor>', '\n'),
            'assistant': Turn(lead='<|MOSS|>: ', end='<eom>', after='\n'),
        },
        markers=('<|Human|>', '<|MOSS|>', '<|Inner Thoughts|>', '<|Commands|>', '<|Results|>', '<eoh>', '<eot>',
                 '<eoc>', '<eor>', '<eom>'),
        stop=('<eoc>', '<eom>'),
    ),
    _llama2('llama2_chat'),
    Template(
        'llama3_chat',
        turns={
            role: Turn(f'<|start_header_id|>{role}<|end_header_id|>\n\n', '<|eot_id|>')
            for role in ('system', 'user', 'assistant')
        },
        markers=('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
        stop=('<|eot_id|>', '<|end_of_text|>'),
    ),
    _llama2('code_llama_chat'),
    Template(
        'chatglm2',
        begin='[gMASK]sop',
        turns={
            'system': Turn(end='\n'),
            'user': Turn('[Round {round}]\n\n问：', after='\n\n'),
            'assistant': Turn('答：', '{eos}', '\n\n'),
        },
        markers=('[gMASK]', 'sop'),
    ),
    Template(
        'chatglm3',
        begin='[gMASK]sop',
        turns={
            'system': Turn('<|system|>\n '),
            'user': Turn('<|user|>\n '),
            'tool': Turn('<|observation|>\n '),
            'assistant': Turn('<|assistant|>', lead='\n ', end='{eos}'),
        },
        markers=('[gMASK]', 'sop', '<|system|>', '<|user|>', '<|observation|>', '<|assistant|>'),
        stop=('<|user|>', '<|observation|>'),
    ),
    _chatml('qwen_chat', '<|endoftext|>'),
    Template(
        'baichuan_chat',
        begin='',
        turns={
            'system': Turn(),
            'user': Turn('<reserved_102>'),
            'assistant': Turn('<reserved_103>', '{eos}'),
        },
        markers=('<reserved_102>', '<reserved_103>'),
    ),
    Template(
        'baichuan2_chat',
        begin='',
        turns={
            'system': Turn(),
            'user': Turn('<reserved_106>'),
            'assistant': Turn('<reserved_107>', '{eos}'),
        },
        markers=('<reserved_106>', '<reserved_107>'),
    ),
    _vicuna('wizardlm'),
    _instruction('wizardcoder', _TASK, Turn('### Response:', '{eos}', '\n\n')),
    _vicuna('vicuna'),
    Template(
        'deepseek_coder',
        turns={
            'system': Turn(after='\n'),
            'user': Turn('### Instruction:\n', after='\n'),
            'assistant': Turn('### Response:\n', '\n<|EOT|>', '\n'),
        },
        markers=('<|EOT|>',),
        stop=('<|EOT|>',),
        default_system='You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek '
        'Company, and you only answer questions related to computer science.',
    ),
    *(
        Template(
            name,
            turns={
                'system': Turn(after='\n\n'),
                'user': Turn('User: ', after='\n\n'),
                'assistant': Turn('Assistant:', lead=' ', end='{eos}'),
            },
        )
        for name in ('deepseek_moe', 'deepseek_v2')
    ),
    _inst('mistral'),
    _inst('mixtral'),
    Template(
        'minicpm',
        turns={'system': Turn(), 'user': Turn('<用户>'), 'assistant': Turn('<AI>', '{eos}')},
        markers=('<用户>', '<AI>'),
    ),
    Template(
        'gemma',
        turns={
            'system': Turn(end='\n\n'),
            'user': Turn('<start_of_turn>user\n', '<end_of_turn>', '\n'),
            'assistant': Turn('<start_of_turn>model\n', '<end_of_turn>', '\n'),
        },
        markers=('<start_of_turn>', '<end_of_turn>'),
        stop=('<end_of_turn>',),
        system_in_user=True,
        alternates=True,
    ),
    Template(
        'cohere_chat',
        turns={
            role: Turn(f'<|START_OF_TURN_TOKEN|><|{token}_TOKEN|>', '<|END_OF_TURN_TOKEN|>')
            for role, token in (('system', 'SYSTEM'), ('user', 'USER'), ('assistant', 'CHATBOT'))
        },
        markers=('<|START_OF_TURN_TOKEN|>', '<|SYSTEM_TOKEN|>', '<|USER_TOKEN|>', '<|CHATBOT_TOKEN|>',
                 '<|END_OF_TURN_TOKEN|>'),
        stop=('<|END_OF_TURN_TOKEN|>',),
    ),
    Template(
        'phi3_chat',
        turns={role: Turn(f'<|{role}|>\n', '<|end|>', '\n') for role in ('system', 'user', 'assistant')},
        markers=('<|system|>', '<|user|>', '<|assistant|>', '<|end|>'),
        stop=('<|end|>',),
    ),
    _instruction('alpaca', _TASK, Turn('### Response:\n', '{eos}', '\n\n')),
]  # fmt: skip

for _template in _ALL:
    TEMPLATES.register_module(name=_template.name, module=_template)


FROM_TOKENIZER = 'from_tokenizer'
"""The name of the tokenizer's own chat template."""


def get_template(name: str | Template, tokenizer: Any = None) -> Template:
    """Returns a template by name.

    Args:
        name: A registered name, `from_tokenizer` for the tokenizer's own chat template, or a `Template` itself.
        tokenizer: If given, the template is checked against it; `from_tokenizer` requires it.

    Raises:
        ConfigError: The name is unknown, or the tokenizer lacks the token that ends the template's answers.
    """
    if isinstance(name, Template):
        template = name
    elif name == FROM_TOKENIZER:
        from xtuner.dataset.templates.from_tokenizer import tokenizer_template

        return tokenizer_template(tokenizer)
    else:
        template = registered(TEMPLATES, name)
        if template is None:
            known = [*TEMPLATES.module_dict, FROM_TOKENIZER]
            raise ConfigError(f'{shown(name)} is not a prompt template{nearest(str(name)[:64], known)}; '
                              f'known: {", ".join(sorted(known))}')  # fmt: skip
    if tokenizer is not None:
        template.check(tokenizer)
    return template
