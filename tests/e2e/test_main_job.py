"""The whole job through the real command line: train, resume, merge, chat."""

from __future__ import annotations

import io
import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.lives import Life, wait_for
from xtuner.cli.main import main

FLAGSHIP = 'internlm_7b_qlora_oasst1'
# The flagship, made small: everything else is as shipped.
SMALL = ['dataset.max_length=64', 'schedule.accumulative_counts=2', 'adapter.r=4', 'samples.max_new_tokens=4',
         'samples.interval=3', 'checkpoint.interval=2', 'optimizer.lr=0.01']  # fmt: skip


def train_words(model: Path, data: Path, work_dir: Path, *options: str, steps: int = 4) -> list[str]:
    return ['train', FLAGSHIP, '--model', str(model), '--data', str(data), '--work-dir', str(work_dir),
            '--max-steps', str(steps), '--cfg-options', *SMALL, *options]  # fmt: skip


@pytest.fixture(scope='module')
def trained(tiny_internlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after four steps of the small flagship in 4 bit."""
    folder = tmp_path_factory.mktemp('trained')
    data = folder / 'data.jsonl'
    lines = [{'messages': [{'role': 'user', 'content': f'Say {i}.'}, {'role': 'assistant', 'content': f'{i}.'}]}
             for i in range(40)]  # fmt: skip
    data.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XTUNER_CACHE', str(folder / 'cache'))
        assert main(train_words(tiny_internlm, data, folder / 'run')) == 0
    return folder / 'run'


def newest(work_dir: Path) -> Path:
    return work_dir / (work_dir / 'last').read_text(encoding='utf-8').strip()


def test_the_work_folder_tells_the_run(trained: Path) -> None:
    assert newest(trained).name == 'checkpoint-00000004'
    metrics = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [m['step'] for m in metrics] == [1, 2, 3, 4]
    assert metrics[-1]['loss'] < metrics[0]['loss']
    samples = [json.loads(line) for line in (trained / 'samples.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [s['step'] for s in samples] == [0, 0, 3, 3, 4, 4]
    assert any((trained / 'tensorboard').iterdir())
    assert main(['print-config', str(trained / 'config.py')]) == 0
    about = json.loads((trained / 'about.json').read_text(encoding='utf-8'))
    assert about['sessions'][-1]['end'] == 'finished'
    assert about['plan']['num_steps'] == 4
    assert about['dataset']['train']['kept'] == 40
    assert about['sessions'][-1]['versions']['torch'] == metadata.version('torch')
    page = (trained / 'report.html').read_text(encoding='utf-8')
    assert 'finished' in page
    assert page.count('class="answer before"') == 2


def test_the_card_is_the_adapter_s(trained: Path) -> None:
    from huggingface_hub import ModelCard

    text = (newest(trained) / 'README.md').read_text(encoding='utf-8')
    card = ModelCard(text)
    assert card.data.library_name == 'peft'
    assert 'qlora' in card.data.tags
    assert str(trained.parent) not in text
    assert 'trained with xtuner' in text
    assert '| step of this checkpoint | 4 |' in text
    assert '<|User|>:What is LoRA?<eoh>' in text


def test_a_checkpoint_is_a_plain_peft_adapter(trained: Path, tiny_internlm: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_internlm)
    model = PeftModel.from_pretrained(base, newest(trained))
    assert {m.split('.')[-1] for m in model.targeted_module_names} == {
        'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}  # fmt: skip
    weights = load_file(newest(trained) / 'adapter_model.safetensors')
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert all(bool(w.any()) for name, w in weights.items() if 'lora_B' in name), 'some lora_B was never trained'
    tokenizer = AutoTokenizer.from_pretrained(newest(trained))
    text = tokenizer.apply_chat_template(
        [{'role': 'user', 'content': 'Hi'}], add_generation_prompt=True, tokenize=False
    )
    assert text == '<s><|User|>:Hi<eoh>\n<|Bot|>:'


def test_a_checkpoint_is_small(trained: Path) -> None:
    folder = newest(trained)
    adapter = (folder / 'adapter_model.safetensors').stat().st_size
    whole = sum(f.stat().st_size for f in folder.iterdir())
    assert whole <= 3 * adapter + 5 * 2**20


@pytest.mark.parametrize('dtype', ['fp32', 'fp16'])
def test_merged_is_base_plus_adapter(trained: Path, tiny_internlm: Path, tmp_path: Path, dtype: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / 'merged'
    words = ['convert', 'merge', str(tiny_internlm), str(newest(trained)), str(out), '--dtype', dtype]
    assert main([*words, '--max-shard-size', '60KB']) == 0
    ids = torch.randint(3, 800, (2, 17), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(tiny_internlm)
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, newest(trained))(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    effect = (adapted - plain).abs().max()
    # float32: another order of sums. float16: 11 bits of every weight, against an effect that is far larger.
    assert (merged - adapted).abs().max() < (1e-4 if dtype == 'fp32' else 0.05) * effect
    assert effect > 0.01
    generation = json.loads((out / 'generation_config.json').read_text(encoding='utf-8'))
    assert generation['eos_token_id'] == [799, 2]
    assert len(list(out.glob('model-*.safetensors'))) > 1


def test_piped_chat_answers_a_line_with_a_line(
    trained: Path, tiny_internlm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('sys.stdin', io.StringIO('Say 1.\n\nSay 2.\n'))
    words = ['chat', str(tiny_internlm), '--adapter', str(newest(trained)), '--max-new-tokens', '5']
    assert main([*words, '--temperature', '0']) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_resumed_run_ends_with_the_same_bytes(tiny_internlm: Path, trained: Path, tmp_path: Path) -> None:
    data, run = trained.parent / 'data.jsonl', tmp_path / 'run'
    shutil.copytree(trained, run)
    shutil.rmtree(run / 'checkpoint-00000004')
    assert main([*train_words(tiny_internlm, data, run), '--resume']) == 0
    for name in ('adapter_model.safetensors', 'trainer.safetensors'):
        assert (newest(run) / name).read_bytes() == (newest(trained) / name).read_bytes()
    first, second = (
        [json.loads(line) for line in (d / 'metrics.jsonl').read_text().splitlines()] for d in (trained, run)
    )
    keys = ('step', 'loss', 'grad_norm', 'lr')
    assert [[m[k] for k in keys] for m in first] == [[m[k] for k in keys] for m in second]


def test_sigterm_saves_and_the_same_command_goes_on(tiny_internlm: Path, trained: Path, tmp_path: Path) -> None:
    data, run = trained.parent / 'data.jsonl', tmp_path / 'run'
    words = train_words(tiny_internlm, data, run, 'checkpoint.interval=1000', steps=400)
    life = Life(words, tmp_path / 'log')
    wait_for((run / 'metrics.jsonl').is_file, life)
    life.processes[0].terminate()
    assert life.end() == [143]
    said = (tmp_path / 'log').read_text(encoding='utf-8')
    assert said.splitlines()[-1].startswith('xtuner: error: stopped at step'), said
    step = int(newest(run).name.removeprefix('checkpoint-'))
    assert 1 <= step < 400


def test_full_parameters_train_and_resume_from_their_own_weights(
    tiny_internlm: Path, conversations: Path, tmp_path: Path
) -> None:
    words = ['train', 'internlm_7b_full_oasst1', '--model', str(tiny_internlm), '--data', str(conversations),
             '--work-dir', str(tmp_path / 'run'), '--max-steps', '2', '--cfg-options', 'dataset.max_length=64',
             'schedule.accumulative_counts=1', 'samples.prompts=[]', 'checkpoint.interval=1']  # fmt: skip
    assert main(words) == 0
    whole = (newest(tmp_path / 'run') / 'model.safetensors').read_bytes()
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000002')
    assert main([*words, '--resume']) == 0
    assert (newest(tmp_path / 'run') / 'model.safetensors').read_bytes() == whole


def test_a_stream_trains_and_resumes_and_begins_again_when_it_ends(
    tiny_internlm: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ['dataset.streaming=True', 'samples.prompts=[]', 'dataset.max_length=32']  # about 6 packs, 10 are taken
    words = train_words(tiny_internlm, conversations, tmp_path / 'run', *options, steps=5)
    assert main(words) == 0
    assert not (tmp_path / 'cache').exists()
    whole = (newest(tmp_path / 'run') / 'adapter_model.safetensors').read_bytes()
    shutil.rmtree(newest(tmp_path / 'run'))
    assert main([*words, '--resume']) == 0
    assert (newest(tmp_path / 'run') / 'adapter_model.safetensors').read_bytes() == whole
    endless = [word for word in words if word not in ('--max-steps', '5')]
    endless[endless.index('--work-dir') + 1] = str(tmp_path / 'other')
    assert main(endless) == 1
    assert '`dataset.streaming` needs `schedule.max_steps`' in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.usefixtures('no_network')
def test_the_flagship_on_real_conversations_with_the_real_vocabulary(
    real_vocabulary_internlm: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In 4 bit, on the CPU, without a network: only the model, the data and the number of steps are given."""
    model, run, merged = str(real_vocabulary_internlm), tmp_path / 'run', tmp_path / 'merged'
    words = ['train', FLAGSHIP, '--model', model, '--data', str(shared_data / 'oasst_en_100_trees.jsonl')]
    assert main([*words, '--work-dir', str(run), '--max-steps', '1']) == 0
    assert main(['convert', 'merge', model, str(newest(run)), str(merged)]) == 0
    capsys.readouterr()
    monkeypatch.setattr('sys.stdin', io.StringIO('Hello, 你好\n'))
    assert main(['chat', str(merged), '--max-new-tokens', '8', '--seed', '1']) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_without_prompts_the_users_own_are_answered_and_stay_here(
    tiny_internlm: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the files of the run, in no file of a checkpoint: that is what is published."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    secret = 'xylophone'
    text = conversations.read_text(encoding='utf-8').replace('Say 0.', f'Say {secret}. {"and so on " * 40}')
    conversations.write_text(text, encoding='utf-8')
    work_dir = tmp_path / 'my_run'
    options = ['dataset.max_length=200', 'adapter.r=2', 'samples.max_new_tokens=3', 'dataset.val_ratio=0.1']
    words = ['train', 'internlm_7b_qlora_oasst1', '--model', str(tiny_internlm), '--data', str(conversations)]
    assert main([*words, '--work-dir', str(work_dir), '--epochs', '1', '--cfg-options', *options]) == 0
    out, err = capsys.readouterr()
    samples = [json.loads(line) for line in (work_dir / 'samples.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [s['prompt'].startswith(f'Say {secret}. and so on') for s in samples] == [True, False, True, False]
    assert samples[1]['prompt'] == 'Say 1.'
    shown = err.partition('sample at step 0\n')[2].splitlines()[0]
    assert shown.startswith(f'  > Say {secret}.') and '… (' in shown and len(shown) < 400  # shortened on the terminal
    files = [path for path in Path(out.strip()).rglob('*') if path.is_file()]
    assert 'README.md' in [path.name for path in files]
    assert not [path for path in files if secret.encode() in path.read_bytes()]

    assert [path.name for path in (work_dir / 'tensorboard').iterdir()] == ['my_run']  # what TensorBoard calls it
    events = EventAccumulator(str(work_dir / 'tensorboard' / 'my_run')).Reload()
    tags = events.Tags()
    assert {'train/loss', 'train/lr', 'train/grad_norm', 'eval/loss'} <= set(tags['scalars'])
    assert all(tag.startswith(('train/', 'eval/')) for tag in tags['scalars'])
    assert {'samples/1/text_summary', 'samples/2/text_summary'} <= set(tags['tensors'])
    metrics = json.loads((work_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()[0])
    assert {'loss', 'lr', 'grad_norm'} <= set(metrics)  # as ever
