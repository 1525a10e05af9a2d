"""The table of bad command lines, configs, data files, models and checkpoints: what is wrong, and what the line says.

Words in capitals stand for what a test makes: MODEL, DATA, RUN (a work folder, missing at first), CONFIG (a file with
the text given), DONE (a work folder with two checkpoints).
"""

from __future__ import annotations

import json

FLAGSHIP = 'internlm_7b_qlora_oasst1'
TRAIN = ['train', FLAGSHIP, '--model', 'MODEL', '--data', 'DATA', '--work-dir', 'RUN', '--max-steps', '1']
SMALL = [
    '--cfg-options',
    'dataset.max_length=64',
    'adapter.r=2',
    'schedule.accumulative_counts=1',
    'samples.prompts=[]',
]

IN_DONE = [*TRAIN[:7], 'DONE', *TRAIN[8:]]

# Command line -> exit status 2 and a part of the message.
WRONG_CALLS: dict[str, tuple[list[str], str]] = {
    'unknown command': (['tarin', FLAGSHIP], "did you mean 'train'"),
    'unknown command, nothing near': (['xyzzy'], 'unknown command'),
    'unknown option before a command': (['--verbose'], 'unknown command'),
    'unknown command of a group': (['convert', 'mrege'], 'needs one of'),
    'train without a config': (['train'], 'config'),
    'unknown option': (['train', FLAGSHIP, '--learning-rate', '1'], '--learning-rate'),
    'abbreviated option': (['train', FLAGSHIP, '--work', 'RUN'], '--work'),
    'two configs': (['train', FLAGSHIP, FLAGSHIP], FLAGSHIP),
    'option without its value': (['train', FLAGSHIP, '--work-dir'], '--work-dir'),
    'steps that are none': ([*TRAIN[:-1], '0'], 'at least 1'),
    'negative steps': ([*TRAIN[:-1], '-3'], '--max-steps'),
    'steps that are no number': ([*TRAIN[:-1], 'many'], '--max-steps'),
    'a seed that is no number': ([*TRAIN, '--seed', 'x'], '--seed'),
    'a launcher that is none': ([*TRAIN, '--launcher', 'mpi'], 'mpi'),
    'torchrun that did not start it': ([*TRAIN, '--launcher', 'pytorch'], 'start with torchrun'),
    'srun that did not start it': ([*TRAIN, '--launcher', 'slurm'], 'start with srun'),
    'no process': ([*TRAIN, '--nproc-per-node', '0'], 'at least 1'),
    'an option without =': ([*TRAIN, '--cfg-options', 'adapter.r'], 'KEY=VALUE'),
    'an option without a key': ([*TRAIN, '--cfg-options', '=3'], 'KEY=VALUE'),
    'resume and start-from': ([*TRAIN, '--resume', '--start-from', 'MODEL'], 'use one of them'),
    'changes without resume': ([*TRAIN, '--allow-changes'], 'add --resume'),
    'chat without a model': (['chat'], 'llm'),
    'bits that are none': (['chat', 'MODEL', '--bits', '5'], '--bits'),
    'a negative temperature': (['chat', 'MODEL', '--temperature', '-1'], '--temperature'),
    'a temperature that is not a number': (['chat', 'MODEL', '--temperature', 'nan'], '--temperature'),
    'a share above one': (['chat', 'MODEL', '--top-p', '1.5'], '--top-p'),
    'a share of nothing': (['chat', 'MODEL', '--top-p', '0'], '--top-p'),
    'no new token': (['chat', 'MODEL', '--max-new-tokens', '0'], '--max-new-tokens'),
    'merge without a folder to write': (['convert', 'merge', 'MODEL', 'DONE'], 'out'),
    'a size that is none': (['convert', 'merge', 'MODEL', 'DONE', 'RUN', '--max-shard-size', 'big'], 'not a size'),
    'a size of nothing': (['convert', 'merge', 'MODEL', 'DONE', 'RUN', '--max-shard-size', '0GB'], 'not a size'),
    'a dtype that is none': (['convert', 'merge', 'MODEL', 'DONE', 'RUN', '--dtype', 'int8'], 'int8'),
    'to-llama without a model': (['convert', 'to-llama'], 'model'),
    'copy-cfg without a folder': (['copy-cfg', FLAGSHIP], 'folder'),
    'a part that is none': (['log-dataset', FLAGSHIP, '--part', 'test'], '--part'),
}  # fmt: skip

_HEAD = 'from mmengine.config import read_base\nwith read_base():\n    from {} import *\n'
_PLAIN = """
from peft import LoraConfig
from torch.optim import AdamW
model = dict(path='m')
dataset = dict(source='d')
optimizer = dict(type=AdamW, lr=1e-4)
adapter = dict(type=LoraConfig, r=2)
"""

# A config's text -> exit status 1 and a part of the message; `print-config CONFIG` and `train CONFIG` both say it.
BAD_CONFIGS: dict[str, tuple[str, str]] = {
    'a syntax error': (_PLAIN + 'schedule = dict(\n', 'config.py:8'),
    'a name that is not there': (_PLAIN + 'schedule = nothing\n', 'nothing'),
    'a program that fails': (_PLAIN + 'x_ = 1 / 0\n', 'division by zero'),
    'a base that is not there': (_HEAD.format('.nonesuch'), 'nonesuch'),
    'an empty file': ('', '`model` is missing'),
    'no data': (_PLAIN.replace('dataset', '_dataset'), '`dataset` is missing'),
    'no optimizer': (_PLAIN.replace('optimizer', '_optimizer'), '`optimizer` is missing'),
    'no path': (_PLAIN.replace("path='m'", ''), '`model.path` is missing'),
    'a section that is none': (_PLAIN + "modell = dict(path='x')\n", "did you mean 'model'"),
    'a helper without underscore': (_PLAIN + 'batch = 4\n', 'underscore'),
    'a key that is none': (_PLAIN + 'schedule = dict(batchsize=4)\n', "did you mean 'batch_size'"),
    'a section as text': (_PLAIN + "schedule = 'fast'\n", '`schedule` must be a dict'),
    'a number as text': (_PLAIN + "schedule = dict(batch_size='4')\n", '`schedule.batch_size` must be a whole number'),
    'a truth for a number': (_PLAIN + 'schedule = dict(batch_size=True)\n', '`schedule.batch_size`'),
    'a fraction of a batch': (_PLAIN + 'schedule = dict(batch_size=1.5)\n', '`schedule.batch_size`'),
    'no batch': (_PLAIN + 'schedule = dict(batch_size=0)\n', 'at least 1'),
    'not a number': (_PLAIN + "schedule = dict(max_epochs=float('nan'))\n", '`schedule.max_epochs`'),
    'without end': (_PLAIN + "schedule = dict(max_epochs=float('inf'))\n", '`schedule.max_epochs`'),
    'a warm-up longer than the run': (_PLAIN + 'schedule = dict(warmup_ratio=3)\n', 'at most 1'),
    'a decay that is none': (_PLAIN + "schedule = dict(decay='cosinus')\n", "'cosine'"),
    'a seed too large': (_PLAIN + 'runtime = dict(seed=2**40)\n', 'at most'),
    'a negative seed': (_PLAIN + 'runtime = dict(seed=-1)\n', 'at least 0'),
    'no checkpoint kept': (_PLAIN + 'checkpoint = dict(max_keep=0)\n', 'max_keep'),
    'a checkpoint never': (_PLAIN + 'checkpoint = dict(interval=0)\n', 'at least 1'),
    'packs of one token': (_PLAIN.replace("source='d'", "source='d', max_length=1"), 'at least 2'),
    'a packing that is none': (_PLAIN.replace("source='d'", "source='d', packing='tight'"), "'best_fit'"),
    'three bits': (_PLAIN + 'quantization = dict(bits=3)\n', 'one of 4, 8'),
    'bits without an adapter': (_PLAIN.replace('adapter', '_adapter') + 'quantization = dict(bits=4)\n', '`adapter`'),
    'a tracker that is none': (_PLAIN + "log = dict(trackers=['mlflow'])\n", "'tensorboard'"),
    'prompts as one text': (_PLAIN + "samples = dict(prompts='Hi')\n", 'a list'),
    'hooks that are no list': (_PLAIN + 'hooks = dict(type=1)\n', '`hooks` must be a list'),
    'an optimizer without type': (_PLAIN.replace('type=AdamW, ', ''), '`optimizer` needs a `type`'),
}  # fmt: skip

# --cfg-options -> exit status 1 and a part of the message, before anything is written.
BAD_VALUES: dict[str, tuple[list[str], str]] = {
    'a module that matches nothing': (['adapter.target_modules=["no_such_layer"]'], 'no_such_layer'),
    'a misspelt argument of the adapter': (['adapter.lora_alfa=8'], "did you mean 'lora_alpha'"),
    'an adapter of rank 0': (['adapter.r=0'], 'adapter'),
    'a rank that is no number': (['adapter.r=four'], 'adapter'),
    'a dropout above one': (['adapter.lora_dropout=1.5'], 'adapter'),
    'an optimizer that is none': (['optimizer.type=torch.optim:AdamZ'], 'AdamZ'),
    'an optimizer of a module that is none': (['optimizer.type=nowhere:Adam'], 'nowhere'),
    'a type that is not callable': (['optimizer.type=torch:__version__'], 'not callable'),
    'a misspelt argument of the optimizer': (['optimizer.learning_rate=1'], 'optimizer.learning_rate'),
    'a negative learning rate': (['optimizer.lr=-1'], 'optimizer'),
    'a learning rate as text': (['optimizer.lr=fast'], 'optimizer'),
    'a template that is none': (['model.template=internlm_chatt'], "did you mean 'internlm_chat'"),
    'half precision on a CPU': (['model.dtype=fp16'], 'model.dtype'),
    'an attention that is not installed': (['model.attention=flash_attention_2'], 'flash_attn'),
    'a map function that is none': (['dataset.map_fn=alpacca'], "did you mean 'alpaca'"),
    'a map function of another format': (['dataset.map_fn=alpaca'], 'data.jsonl:1'),
    'a map function that cannot be imported': (['dataset.map_fn=nowhere:f'], 'nowhere'),
    'a hook that is none': (['hooks=[{"type": "nowhere:Hook"}]'], 'nowhere'),
    'a hook without type': (['hooks=[{"interval": 1}]'], 'hooks[0]'),
    'a tracker that is not installed': (['log.trackers=["wandb"]'], "pip install 'xtuner[trackers]'"),
    'a value inside a value': (['schedule.batch_size.x=1'], 'schedule.batch_size'),
    'all kept for validation': (['dataset.val_ratio=1.0'], 'dataset.val_ratio'),
    'two kinds of validation': (['dataset.val_ratio=0.1', 'dataset.val_file=DATA'], 'dataset.val_file'),
    'validation data that is not there': (['dataset.val_file=none.jsonl'], 'none.jsonl'),
    'groups of packs': (['dataset.group_by_length=True'], 'dataset.group_by_length'),
    'all conversations too long': (['dataset.max_length=3', 'dataset.on_long=drop'], 'max_dropped'),
    'a conversation too long': (['dataset.max_length=3', 'dataset.on_long=error'], 'data.jsonl:1'),
    'no epoch': (['schedule.max_steps=None', 'schedule.max_epochs=0'], 'schedule.max_epochs'),
    'a stream without end': (['dataset.streaming=True', 'schedule.max_steps=None'], 'schedule.max_steps'),
    'an empty list of sources': (['dataset.source=[]'], 'dataset.source'),
    'a source with a misspelt key': (['dataset.source={"pth": "x"}'], 'dataset.source'),
    'a weight below nothing': (['dataset.source={"path": "DATA", "weight": -1}'], 'weight'),
    'a cache that cannot be written': (['dataset.cache_dir=/proc/none'], 'dataset.cache_dir'),
}  # fmt: skip

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def _messages(*messages: object) -> str:
    return GOOD + json.dumps({'messages': messages}) + '\n'


_USER, _ANSWER = {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}

# Name and content of the data file -> exit status 1 and a part of the message.
BAD_DATA: dict[str, tuple[str, str | bytes | None, str]] = {
    'missing': ('data.jsonl', None, 'data.jsonl'),
    'empty': ('data.jsonl', '', 'data.jsonl'),
    'blank lines only': ('data.jsonl', '\n\n\n', 'data.jsonl'),
    'malformed': ('data.jsonl', GOOD + '{"messages": [\n', 'data.jsonl:2'),
    'cut off': ('data.jsonl', GOOD + GOOD[:30], 'data.jsonl:2'),
    'two records in a line': ('data.jsonl', GOOD + GOOD.strip() + GOOD, 'data.jsonl:2'),
    'not UTF-8': ('data.jsonl', GOOD.encode() + b'\xff\xfe{}\n', 'data.jsonl:2'),
    'UTF-16': ('data.jsonl', GOOD.encode('utf-16'), 'data.jsonl'),
    'zeros': ('data.jsonl', bytes(1000), 'data.jsonl'),
    'a list in a line': ('data.jsonl', GOOD + '[1, 2]\n', 'data.jsonl:2'),
    'a number in a line': ('data.jsonl', GOOD + '7\n', 'data.jsonl:2'),
    'unknown columns': ('data.jsonl', '{"question_zh": "a", "reply": "b"}\n', 'question_zh'),
    'an unknown role': ('data.jsonl', GOOD + GOOD.replace('user', 'usr'), 'data.jsonl:2'),
    'nothing to train': ('data.jsonl', json.dumps({'messages': [_USER]}) + '\n', 'data.jsonl'),
    'no messages': ('data.jsonl', _messages(), 'data.jsonl:2'),
    'messages that are no list': ('data.jsonl', GOOD + '{"messages": "hi"}\n', 'data.jsonl:2'),
    'a message that is none': ('data.jsonl', _messages(_USER, 'b'), 'data.jsonl:2'),
    'a message without a role': ('data.jsonl', _messages(_USER, {'content': 'b'}), 'data.jsonl:2'),
    'a message without content': ('data.jsonl', _messages(_USER, {'role': 'assistant'}), 'data.jsonl:2'),
    'content that is a number': ('data.jsonl', _messages(_USER, {'role': 'assistant', 'content': 3}), 'data.jsonl:2'),
    'a JSON file cut off': ('data.json', '[' + GOOD, 'data.json'),
    'a JSON file of a number': ('data.json', '3', 'data.json'),
    'a JSON file of nothing': ('data.json', '[]', 'data.json'),
    'a CSV without the columns': ('data.csv', 'a,b\n1,2\n', 'data.csv'),
    'a CSV with a header only': ('data.csv', 'instruction,output\n', 'data.csv'),
    'a parquet that is none': ('data.parquet', b'PAR1xxxx', 'data.parquet'),
    'a kind that is not read': ('data.xlsx', b'PK', 'data.xlsx'),
    'no suffix': ('data', GOOD, 'data'),
    'a folder without data': ('data/readme.md', 'hello', 'data'),
}  # fmt: skip

# What is done to the model's folder -> exit status 1 and a part of the message. `remove`, `cut`, or a file's content;
# a dict changes config.json.
BAD_MODELS: dict[str, tuple[dict[str, object], str]] = {
    'missing': ({'.': 'remove'}, 'model'),
    'a file in its place': ({'.': 'file'}, 'model'),
    'without weights': ({'model.safetensors': 'remove'}, 'weights'),
    'without tokenizer': ({'tokenizer.model': 'remove', 'tokenizer_config.json': 'remove'}, 'tokenizer'),
    'without config': ({'config.json': 'remove'}, 'config.json'),
    'weights cut off': ({'model.safetensors': 'cut'}, 'model.safetensors'),
    'weights that are none': ({'model.safetensors': b'no weights'}, 'model.safetensors'),
    'empty weights': ({'model.safetensors': b''}, 'model.safetensors'),
    'a tokenizer that is none': ({'tokenizer.model': b'no model'}, 'tokenizer.model'),
    'an empty tokenizer': ({'tokenizer.model': b''}, 'tokenizer'),
    'tokenizer settings that are none': ({'tokenizer_config.json': b'['}, 'tokenizer_config.json'),
    'a config that is none': ({'config.json': b'{'}, 'config.json'),
    'a config that is a list': ({'config.json': b'[]'}, 'config.json'),
    'a config that is not UTF-8': ({'config.json': b'\xff'}, 'config.json'),
    'an index of nothing': ({'model.safetensors.index.json': b'{}'}, 'index.json'),
    'an index of missing files': (
        {'model.safetensors.index.json': b'{"weight_map": {"a": "b.safetensors"}}'}, 'b.safetensors'),
    'weights of another shape': ({'config.json': {'intermediate_size': 96}}, 'mlp'),
    'more layers than weights': ({'config.json': {'num_hidden_layers': 3}}, 'but the weights contain 2 layers'),
    'fewer layers than weights': ({'config.json': {'num_hidden_layers': 1}}, 'layers.1'),
    'a smaller vocabulary than the weights': ({'config.json': {'vocab_size': 700}}, 'embed_tokens'),
    'an unknown kind of model': ({'config.json': {'model_type': 'nonesuch'}}, 'nonesuch'),
    'no kind of model': ({'config.json': {'model_type': None}}, 'type'),
    'heads that do not divide': ({'config.json': {'num_attention_heads': 5}}, 'config.json'),
    'a width that is text': ({'config.json': {'hidden_size': 'wide'}}, 'config.json'),
}  # fmt: skip

# Command line -> exit status 1 and a part of the message; DONE is a work folder with checkpoint-00000001 and 2.
BAD_CHECKPOINTS: dict[str, tuple[list[str], str]] = {
    'a run is there already': ([*IN_DONE, *SMALL], 'already contains checkpoints; add --resume'),
    'resume from nowhere': ([*TRAIN, '--resume', 'none/checkpoint-00000001', *SMALL], 'no such folder'),
    'resume from a file': ([*TRAIN, '--resume', 'DATA', *SMALL], 'no such folder'),
    'resume from a model': ([*TRAIN, '--resume', 'MODEL', *SMALL], 'not a complete checkpoint'),
    'another learning rate': (
        [*IN_DONE, '--resume', *SMALL, 'optimizer.lr=1'], '`optimizer.lr` was 0.0002 and is now 1'),
    'another rank': ([*IN_DONE, '--resume', *SMALL, 'adapter.r=4'],
                     '`adapter.r` was 2 and is now 4'),
    'another rank, allowed': (
        [*IN_DONE, '--resume', '--allow-changes', *SMALL, 'adapter.r=4'], 'cannot change within a run'),
    'another optimizer': ([*IN_DONE, '--resume', *SMALL, 'optimizer.type=torch.optim:AdamW'],
                          '`optimizer.type`'),
    'no adapter any more': ([*IN_DONE, '--resume', *SMALL[:2], 'adapter=None',
                             'quantization=None'], '`adapter'),
    'another seed': ([*IN_DONE, '--seed', '7', '--resume', *SMALL], '`runtime.seed` was 42 and is now 7'),
    'fewer steps, allowed': ([*IN_DONE, '--resume', '--allow-changes', *SMALL], 'only 1'),
    'start from nowhere': ([*TRAIN, '--start-from', 'none', *SMALL], 'no such folder'),
    'start from another rank': ([*TRAIN, '--start-from', 'DONE/checkpoint-00000002', *SMALL, 'adapter.r=4'],
                                '`adapter.r` is 4, but'),
    'a work folder as the model': (['chat', 'DONE'], "contains an adapter, not a model; use its base as the model ('"),
    'a file beneath which nothing can be': (['convert', 'merge', 'MODEL', 'DONE', 'DATA/merged'], 'is a file'),
    'merge of nothing': (['convert', 'merge', 'MODEL', 'none', 'RUN'], 'no adapter found'),
    'merge into a folder that holds something': (
        ['convert', 'merge', 'MODEL', 'DONE/checkpoint-00000002', 'DONE'], 'is not empty'),
    'chat with an adapter that is none': (['chat', 'MODEL', '--adapter', 'none'], 'no adapter found'),
    'chat with a model that is none': (['chat', './none'], 'none'),
    'chat with a template that is none': (['chat', 'MODEL', '--prompt-template', 'internlm_chatt'],
                                          "did you mean 'internlm_chat'"),
    'to-llama of nothing': (['convert', 'to-llama', './none', 'RUN'], 'none'),
    'a shipped config that is none': (['train', 'internlm_7b_qlora_oast1'], "did you mean 'internlm_7b_qlora_oasst1'"),
    'a config file that is none': (['print-config', 'none.py'], 'no config file'),
    'a config that is a folder': (['print-config', 'MODEL'], 'is not a config'),
    'copy of a config that is none': (['copy-cfg', 'nonesuch', 'RUN'], 'no config'),
}  # fmt: skip
