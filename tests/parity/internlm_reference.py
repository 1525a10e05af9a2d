"""InternLM, InternLM2 and InternLM3 in NumPy, from the architecture's definition; shares no code with the package.

float32 throughout. One text at a time, no padding. A cache holds what the originals' hold: the values, and the keys,
unrotated for InternLM (they are all rotated anew at the current base), rotated for InternLM2 and InternLM3.
"""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(eps)) * weight


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    y = x @ weights[f'{name}.weight'].T
    return y + weights[f'{name}.bias'] if f'{name}.bias' in weights else y


def angles(length: int, head_size: int, rotary: dict, trained: int, base_length: int) -> np.ndarray:
    """(length, head_size / 2): position times frequency."""
    base, factor, kind = rotary.get('base', 10000), rotary.get('factor', 1.0), rotary.get('type', 'plain')
    if kind == 'dynamic' and base_length > trained:
        base = base * (factor * base_length / trained - (factor - 1)) ** (head_size / (head_size - 2))
    frequencies = 1.0 / np.power(np.float32(base), np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size))
    positions = np.arange(length, dtype=np.float32) / np.float32(factor if kind == 'linear' else 1)
    return np.outer(positions, frequencies).astype(np.float32)


def rotate(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """x (heads, length, size): the pairs are (i, i + size / 2)."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(theta), np.sin(theta)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Causal attention: (H, S, D), (K, S, D), (K, S, D) to (S, H * D)."""
    shared = query.shape[0] // key.shape[0]
    key, value = np.repeat(key, shared, axis=0), np.repeat(value, shared, axis=0)
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(np.float32(query.shape[-1]))
    seen = np.tril(np.ones(scores.shape[1:], bool), k=scores.shape[2] - scores.shape[1])
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (shares / shares.sum(-1, keepdims=True)) @ value
    return mixed.transpose(1, 0, 2).reshape(mixed.shape[1], -1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def split_heads(x: np.ndarray, num_heads: int) -> np.ndarray:
    return x.reshape(x.shape[0], num_heads, -1).transpose(1, 0, 2)


def fused_heads(x: np.ndarray, num_heads: int, num_key_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Takes InternLM2's fused rows apart, one head after the other."""
    size = x.shape[1] // (num_heads + 2 * num_key_heads)
    blocks = iter(np.split(x, x.shape[1] // size, axis=1))
    query, key, value = [], [], []
    for _ in range(num_key_heads):
        query += [next(blocks) for _ in range(num_heads // num_key_heads)]
        key.append(next(blocks))
        value.append(next(blocks))
    return np.stack(query), np.stack(key), np.stack(value)


def logits(
    weights: Weights, config: dict, ids: list[int], base_length: int | None = None, cache: list | None = None
) -> np.ndarray:
    """(len(ids), vocabulary).

    `base_length`: the length that sets the dynamic base; None: the text's own. `cache`: an empty list at first; the
    ids then go on from those of the calls before.
    """
    fused = 'model.tok_embeddings.weight' in weights
    heads, eps = config['num_attention_heads'], config['rms_norm_eps']
    key_heads = config.get('num_key_value_heads') or heads
    head_size, trained = config.get('head_dim') or config['hidden_size'] // heads, config['max_position_embeddings']
    rotated = config['model_type'] != 'internlm'  # whether the cache holds keys as they were rotated
    before = cache[0][0].shape[1] if cache else 0
    length = before + len(ids)
    theta = angles(length, head_size, config['reference_rotary'], trained, base_length or length)
    x = weights['model.tok_embeddings.weight' if fused else 'model.embed_tokens.weight'][ids]
    for i in range(config['num_hidden_layers']):
        block = f'model.layers.{i}.'
        attention, mlp = ('attention', 'feed_forward') if fused else ('self_attn', 'mlp')
        first, second = ('attention_norm', 'ffn_norm') if fused else ('input_layernorm', 'post_attention_layernorm')
        gate, up, down = ('w1', 'w3', 'w2') if fused else ('gate_proj', 'up_proj', 'down_proj')
        normed = rms_norm(x, weights[f'{block}{first}.weight'], eps)
        if fused:
            q, k, v = fused_heads(linear(normed, weights, f'{block}{attention}.wqkv'), heads, key_heads)
        else:
            q, k, v = (
                split_heads(linear(normed, weights, f'{block}{attention}.{p}_proj'), count)
                for p, count in zip('qkv', (heads, key_heads, key_heads), strict=True)
            )
        if rotated:
            k = rotate(k, theta[before:])
        if before:
            k, v = np.concatenate([cache[i][0], k], axis=1), np.concatenate([cache[i][1], v], axis=1)
        if cache is not None:
            cache[i : i + 1] = [(k, v)]
        mixed = attend(rotate(q, theta[before:]), k if rotated else rotate(k, theta), v)
        x = x + linear(mixed, weights, f'{block}{attention}.{"wo" if fused else "o_proj"}')
        normed = rms_norm(x, weights[f'{block}{second}.weight'], eps)
        gated = silu(linear(normed, weights, f'{block}{mlp}.{gate}')) * linear(normed, weights, f'{block}{mlp}.{up}')
        x = x + linear(gated, weights, f'{block}{mlp}.{down}')
    x = rms_norm(x, weights['model.norm.weight'], eps)
    return x @ weights['output.weight' if fused else 'lm_head.weight'].T


def loss(weights: Weights, config: dict, ids: list[int]) -> float:
    """Mean negative log-likelihood of each id after the first."""
    scores = logits(weights, config, ids)[:-1].astype(np.float64)
    log_sums = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    return float((log_sums - scores[np.arange(len(ids) - 1), ids[1:]]).mean())


def greedy(weights: Weights, config: dict, ids: list[int], num_new: int, *, cached: bool) -> list[int]:
    """Continues a text with the likeliest id each time, from a cache or reading the whole text anew for each."""
    ids = list(ids)
    cache: list | None = [] if cached else None
    for step in range(num_new):
        new = ids[-1:] if cached and step else ids
        ids.append(int(logits(weights, config, new, cache=cache)[-1].argmax()))
    return ids
