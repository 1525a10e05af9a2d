"""Merged weights against peft's own model in memory: every kind of adapter, several at once, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.convert.adapters import GPT2, KINDS, TIED, VOCAB, make_base, make_gpt2, save_trained
from xtuner.adapters.attach import Provenance
from xtuner.adapters.delta import LoraDelta
from xtuner.adapters.file import AdapterFile
from xtuner.adapters.load import load_adapter
from xtuner.cli.main import main
from xtuner.config.schema import QuantizationConfig
from xtuner.convert.merge import merge
from xtuner.errors import CheckpointError, ModelError, UsageError
from xtuner.model.loading import load_model
from xtuner.model.weights import blocks
from xtuner.model.weights.reader import fingerprint, open_weights

IDS = torch.randint(3, VOCAB, (2, 19), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp('base'))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows in every matrix."""
    monkeypatch.setattr(blocks, 'BLOCK_ELEMENTS', 1000)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def check(base: Path, kind: dict[str, Any], tmp_path: Path, dtype: str) -> None:
    adapted = logits(save_trained(base, tmp_path / 'adapter', **kind))
    out = merge(str(base), tmp_path / 'adapter', tmp_path / 'merged', dtype=dtype, max_shard_bytes=60_000)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert merged.generation_config is not None
    difference = (logits(merged) - adapted).abs().max()
    # float32: sums in another order. float16: each weight is off by 2^-12 of itself at most.
    assert difference < {'fp32': 2e-5, 'fp16': 1.2e-2}[dtype] * adapted.std()


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_gives_the_logits_of_base_and_adapter(base: Path, kind: str, tmp_path: Path) -> None:
    check(base, KINDS[kind], tmp_path, 'fp32')


@pytest.mark.parametrize('kind', ['LoRA', 'DoRA', 'embedding, DoRA', 'resized'])
def test_in_half_precision_they_differ_by_its_rounding(base: Path, kind: str, tmp_path: Path) -> None:
    check(base, KINDS[kind], tmp_path, 'fp16')


@pytest.mark.parametrize('kind', TIED)
def test_a_shared_embedding_is_written_apart_only_where_it_must(kind: str, tmp_path: Path) -> None:
    check(make_base(tmp_path / 'base', tied=True), TIED[kind], tmp_path, 'fp32')
    apart = not json.loads((tmp_path / 'merged' / 'config.json').read_text())['tie_word_embeddings']
    assert apart == (kind in ('output head', 'embedding', 'embedding whole'))


@pytest.mark.parametrize('kind', GPT2)
def test_layers_that_hold_their_weights_transposed(kind: str, tmp_path: Path) -> None:
    check(make_gpt2(tmp_path / 'base'), GPT2[kind], tmp_path, 'fp32')


@pytest.fixture(scope='module')
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA, another one with whole modules, and a DoRA, of the same base."""
    folder = tmp_path_factory.mktemp('adapters')
    save_trained(base, folder / 'a')
    save_trained(base, folder / 'b', seed=2, r=3, modules_to_save=['lm_head'], target_modules=['q_proj', 'up_proj'])
    save_trained(base, folder / 'c', seed=3, use_dora=True, target_modules=['up_proj', 'down_proj'])
    return {name: folder / name for name in 'abc'}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()


def test_changes_of_several_adapters_add_up_with_their_weights(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    alone = {}
    for name, folder in adapters.items():
        merge(str(base), folder, tmp_path / name, dtype='fp32')
        alone[name] = weights(tmp_path / name)
    words = ['convert', 'merge', str(base), str(adapters['a']), str(tmp_path / 'all'), '--weight', '0.25', '--dtype',
             'fp32', '--add', f'{adapters["b"]}:-0.5', '--add', str(adapters['c'])]  # fmt: skip
    assert main(words) == 0
    merged, before = weights(tmp_path / 'all'), weights(base)
    for name, tensor in before.items():
        changes = [w * (alone[a][name] - tensor) for a, w in (('a', 0.25), ('b', -0.5), ('c', 1.0))]
        torch.testing.assert_close(merged[name], tensor + sum(changes), rtol=1e-5, atol=1e-6)


def test_the_base_that_training_saw_and_the_published_one(
    base: Path, adapters: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The adapter on the quantised model, as it was trained: which merged model is nearer, and by how much."""
    adapter = shutil.copytree(adapters['a'], tmp_path / 'adapter')
    settings = QuantizationConfig()
    digest = fingerprint(open_weights(base))
    Provenance(str(base), digest, 'internlm_chat', 'fp32', dataclasses.asdict(settings)).write(adapter)
    quantized = load_model(base, dtype=torch.float32, quantization=settings)
    trained = logits(load_adapter(quantized, adapter).eval())
    far = {}
    with caplog.at_level('INFO', logger='xtuner'):
        for kind in ('original', 'dequantized'):
            out = merge(str(base), adapter, tmp_path / kind, base=kind, dtype='fp16')
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            far[kind] = float((logits(model) - trained).abs().max() / trained.std())
    assert far['dequantized'] < 0.012 < 0.1 < far['original']
    assert 'base original: the published weights, more precise than the 4-bit values' in caplog.text
    assert 'base dequantized: the 4-bit values used in training' in caplog.text
    assert 'verified on 4 prompts' in caplog.text


def refused(error: type[Exception], match: str, llm: Path, adapter: Path, out: Path, **options: Any) -> None:
    with pytest.raises(error, match=match):
        merge(str(llm), adapter, out, **options)
    assert not list(out.parent.glob('*merged*'))


def test_an_adapter_that_would_do_nothing_or_something_else_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / 'merged'
    file = 'adapter_model.safetensors'
    tensors = load_file(adapters['a'] / file)
    layer = 'base_model.model.model.layers.0.self_attn.q_proj'

    def variant(name: str, changes: dict[str, torch.Tensor | None], config: dict[str, Any] | None = None) -> Path:
        folder = shutil.copytree(adapters['a'], tmp_path / name)
        kept = {key: value for key, value in (tensors | changes).items() if value is not None}
        save_file(kept, folder / file)
        settings = json.loads((folder / 'adapter_config.json').read_text()) | (config or {})
        (folder / 'adapter_config.json').write_text(json.dumps(settings))
        return folder

    beyond = 'base_model.model.model.layers.9.mlp.up_proj'
    surplus = variant(
        'surplus', {f'{beyond}.lora_A.weight': torch.ones(4, 64), f'{beyond}.lora_B.weight': torch.ones(128, 4)}
    )
    refused(CheckpointError, r'2 of its 30 tensors do not match it, .*layers.9.mlp', base, surplus, out)
    zero = variant('zero', {key: torch.zeros_like(value) for key, value in tensors.items() if 'lora_B' in key})
    refused(CheckpointError, r"changes nothing: the update of 'model\S+ \(and 13 more\) is all zero", base, zero, out)
    tiny = variant('tiny', {key: torch.full_like(value, 1e-14) for key, value in tensors.items() if 'lora_B' in key})
    refused(CheckpointError, r'in float16 no value of .* \(and 13 more\) changes', base, tiny, out, dtype='fp16')
    part = variant('part', {key: None for key in tensors if '.layers.1.' in key})
    refused(CheckpointError, '14 of the 28 tensors that its adapter_config.json requires are not in its file', base,
            part, out)  # fmt: skip
    half = variant('half', {f'{layer}.lora_B.weight': None})
    refused(CheckpointError, r'1 of the 28 tensors .* are not in its file, such as .*q_proj.lora_B', base, half, out)
    wide = variant('wide', {f'{layer}.lora_B.weight': torch.ones(65, 4)})
    refused(CheckpointError, r'lora_B\S+ is \[65, 4\] in its file but', base, wide, out)
    refused(CheckpointError, "initialized with 'pissa', which changes the base as well", base,
            variant('pissa', {}, {'init_lora_weights': 'pissa'}), out)  # fmt: skip
    refused(CheckpointError, '`layer_replication` cannot be merged', base,
            variant('copies', {}, {'layer_replication': [[0, 2]]}), out)  # fmt: skip
    refused(CheckpointError, 'this is IA3', base, variant('ia3', {}, {'peft_type': 'IA3'}), out)
    large = variant('large', {f'{layer}.lora_B.weight': torch.full((64, 4), 1e7)})
    refused(ModelError, 'values beyond the range of float16; use --dtype bf16', base, large, out, dtype='fp16')
    refused(UsageError, 'was not trained on quantized weights', base, adapters['a'], out, base='dequantized')
    refused(UsageError, 'sees no CUDA device', base, adapters['a'], out, device='cuda')


def test_what_did_not_change_is_counted_and_the_rest_is_merged(
    base: Path, adapters: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Experts that no token reached, layers that were frozen: a zero factor, or a whole module as it was."""
    adapter = tmp_path / 'adapter'
    adapted = save_trained(base, adapter, modules_to_save=['lm_head'])
    file, layer = adapter / 'adapter_model.safetensors', 'base_model.model.model.layers.0.self_attn.q_proj'
    tensors = load_file(file)
    tensors['base_model.model.lm_head.weight'] = open_weights(base).read('lm_head.weight')
    tensors[f'{layer}.lora_B.weight'].zero_()
    save_file(tensors, file)
    out = merge(str(base), adapter, tmp_path / 'merged', dtype='fp32')
    assert "has an all-zero update for 1 of 15 tensors: 'model.layers.0.self_attn.q_" in caplog.text
    assert "2 of the 15 adapted tensors keep all their values: 'lm_head.weight' (and 1 more)" in caplog.text
    merged, before, name = weights(out), weights(base), 'model.layers.0.mlp.up_proj.weight'
    assert torch.equal(merged[f'{layer[17:]}.weight'], before[f'{layer[17:]}.weight'])
    wanted = adapted.merge_and_unload().state_dict()[name].double()
    torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(merged[name], before[name])


def test_another_base_only_by_force(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(adapters['a'], tmp_path / 'adapter')
    Provenance('elsewhere', '0' * 64, 'internlm_chat', 'bf16').write(adapter)
    refused(CheckpointError, 'was trained on another base: elsewhere', base, adapter, tmp_path / 'merged')
    out = merge(str(base), adapter, tmp_path / 'merged', force=True)
    assert json.loads((out / 'config.json').read_text())['dtype'] == 'bfloat16'  # as the adapter was trained


def test_the_check_finds_a_wrong_result(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong scale in one layer, and one swapped tensor, are each far beyond rounding."""
    right = LoraDelta.rows

    def wrong(self: LoraDelta, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return dataclasses.replace(self, scale=2 * self.scale)._right(rows, start, stop)  # type: ignore[attr-defined]

    monkeypatch.setattr(LoraDelta, '_right', right, raising=False)
    monkeypatch.setattr(LoraDelta, 'rows', wrong)
    refused(ModelError, 'differs from base and adapter: logit difference', base, adapters['a'], tmp_path / 'merged')
    merge(str(base), adapters['a'], tmp_path / 'unchecked', verify=0)


@pytest.mark.parametrize('mistake', ['scale', 'a tensor forgotten'])
def test_the_check_shares_nothing_with_what_it_checks(
    mistake: str, base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads the adapter's file for the merge errs: the reference is peft's, from the file itself."""
    if mistake == 'scale':
        right = AdapterFile._scale
        monkeypatch.setattr(AdapterFile, '_scale', lambda self, *args: 2 * right(self, *args))
    else:
        whole = AdapterFile.targets.fget
        assert whole is not None
        monkeypatch.setattr(
            AdapterFile, 'targets', property(lambda self: whole(self) - {'model.layers.1.mlp.up_proj.weight'})
        )
    refused(ModelError, 'differs from base and adapter: logit difference', base, adapters['a'], tmp_path / 'merged')


@pytest.mark.skipif(not Path('/proc/self/mem').is_file(), reason='nothing here that can be opened and not read')
def test_a_file_of_the_base_that_cannot_be_read_is_named(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Not the folder that is written, which has nothing wrong."""
    shutil.copytree(base, tmp_path / 'base')
    (tmp_path / 'base' / 'LICENSE').symlink_to('/proc/self/mem')
    with pytest.raises(ModelError, match=r'base/LICENSE cannot be read: Input/output error'):
        merge(str(tmp_path / 'base'), adapters['a'], tmp_path / 'out', verify=0)
    assert [path.name for path in tmp_path.iterdir()] == ['base']  # the same command could not go on


def test_the_folder_is_complete_for_other_tools(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    own = shutil.copytree(base, tmp_path / 'base')
    adapter = shutil.copytree(adapters['a'], tmp_path / 'adapter')
    Provenance('here', fingerprint(open_weights(own)), 'internlm_chat', 'fp32').write(adapter)
    # What made saving fail elsewhere: sampling settings without sampling.
    bad = {'temperature': 0.7, 'top_p': 0.9, 'bos_token_id': 1, 'eos_token_id': 2}
    (own / 'generation_config.json').write_text(json.dumps(bad))
    (own / 'LICENSE').write_text('terms')
    out = merge(str(own), adapter, tmp_path / 'merged')
    generation = GenerationConfig.from_pretrained(out)
    generation.save_pretrained(tmp_path / 'again')
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert generation.eos_token_id == [tokenizer.convert_tokens_to_ids('<eoa>'), 2]
    assert generation.temperature in (None, 1.0)
    text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False)
    assert text.startswith('<s><|User|>:Hi<eoh>')
    assert (out / 'tokenizer.model').read_bytes() == (own / 'tokenizer.model').read_bytes()
    assert (out / 'LICENSE').read_text() == 'terms'
    assert not list(out.glob('*.part'))
    assert not (out / 'unfinished').exists()
