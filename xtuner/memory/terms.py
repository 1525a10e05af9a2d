"""The terms of a training step's memory on a GPU, each a function of sizes alone; `memory.py` adds them up.

Letters: T tokens of a micro-batch, H hidden, I inner, A = heads x D, V vocabulary, L layers, r rank, b bytes of a value
in the compute dtype. A term is a function of `Setup` that returns bytes; its docstring has the formula and where it is
read from.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS
from xtuner.fused.loss import slice_tokens_for
from xtuner.fused.recompute import saved_bytes
from xtuner.memory.dims import ModelDims

_PLACES = 3  # `graphs._AHEAD`: places for layers' inputs beside recorded graphs
_OFFLOAD_FROM = 2**28  # `FusedDecoder.offload_from_bytes`
_BLOCK, _COARSE = 64, 256  # bitsandbytes: values that share a scale, scales that share one
# cuBLAS keeps 32 MiB for each stream that multiplies on compute capability 9.0, 8 MiB before; 9.0 is assumed.
_PRODUCT_SPACE = 2**25
# CUDA's context and the libraries' kernels, which torch does not count, and what its allocator holds in unused pieces,
# as a share of what is used; measured on an H100 (benchmarks/estimate_h100_2026-11-25.md).
CONTEXT_BYTES = 920 * 2**20
FRAGMENTS = 0.05


@dataclass(frozen=True)
class Setup:
    """What the memory of a step depends on.

    Attributes:
        shape: The model and its adapter.
        tokens: T, tokens of a micro-batch on one device, filled up.
        longest: Tokens of a row.
        bits: Of a frozen weight of the blocks: 4 or 8; None where it is not quantised.
        double_quant: Whether the scales of 4 bit are quantised too.
        value_bytes: b.
        checkpointing: Whether activations are computed again.
        num_recomputed: On the fast path, how many layers are; None: all but the last where `checkpointing`, else none.
        fast: Whether the fast path is asked for.
        accumulated: Whether a step has several micro-batches, so that gradients lie there during a forward pass.
        optimizer_bytes: Of optimizer state for each trained element.
        paged: Whether that state is in managed memory, which torch does not count and the driver may move out.
        optimizer_spare: Bytes for each trained element that the update itself takes for a moment.
        world_size: Devices.
        target_share: Of the tokens, how many are trained.
    """

    shape: ModelDims
    tokens: int
    longest: int
    bits: int | None = 4
    double_quant: bool = True
    value_bytes: int = 2
    checkpointing: bool = True
    num_recomputed: int | None = None
    fast: bool = True
    accumulated: bool = True
    optimizer_bytes: float = 8
    paged: bool = True
    optimizer_spare: float = 0
    world_size: int = 1
    target_share: float = 1.0

    @property
    def full(self) -> bool:
        """Whether the base itself is trained."""
        return self.shape.num_trained >= self.shape.num_base

    @property
    def on_fast_path(self) -> bool:
        """Whether the fast path is taken."""
        return self.fast and not self.shape.unsupported_reason and self.bits != 8

    @property
    def recomputed_layers(self) -> int:
        """How many layers keep only their input."""
        if not self.on_fast_path:
            return self.shape.num_layers if self.checkpointing else 0
        if self.num_recomputed is not None:
            return self.num_recomputed
        return self.shape.num_layers - 1 if self.checkpointing else 0

    @property
    def graphs(self) -> bool:
        """Whether layers are recorded as CUDA graphs (`kernels.graphs.suits`)."""
        return self.on_fast_path and self.tokens <= MAX_GRAPH_TOKENS and self.value_bytes == 2 and any(self.shape.ranks)

    @property
    def offloaded(self) -> bool:
        """Whether layers' inputs go to the host (`FusedDecoder._store`); the host is assumed to have room."""
        return self.on_fast_path and self.recomputed_layers * row_bytes(self) >= _OFFLOAD_FROM

    @property
    def group_ranks(self) -> tuple[int, int, int, int]:
        """Summed ranks on q, k and v; o; gate and up; down."""
        q, k, v, o, gate, up, down = self.shape.ranks
        return q + k + v, o, gate + up, down


# ---- what is there for the whole run


def base_weights(setup: Setup) -> int:
    """All but the input embedding. 4 bit: NK / 2 + scales; the head, norms and biases stay in the compute dtype.

    A scale for 64 values takes 4 bytes, quantised 1 + 4 / 256 (arXiv:2305.14314, section 3). 8 bit: NK + 4 N. Trained
    weights are float32, and counted as such here.
    """
    shape, size = setup.shape, 4 if setup.full else setup.value_bytes
    if setup.bits == 4:
        scale = 1 + 4 / _COARSE if setup.double_quant else 4
        linear = shape.num_linear * (0.5 + scale / _BLOCK)
    elif setup.bits == 8:
        linear = shape.num_linear + 4 * sum(n for n, _ in shape.linear)
    else:
        linear = shape.num_linear * size
    return int(linear) + (shape.num_head + shape.num_other) * size


def input_embedding(setup: Setup) -> int:
    """V H b; on the fast path 0, where it is frozen and not tied: it lies on the host (`move_embedding_to_host`)."""
    size = 4 if setup.full else setup.value_bytes
    on_host = setup.on_fast_path and setup.shape.num_head and size == 2 and not setup.full
    return 0 if on_host else setup.shape.num_embedding * size


def trained_weights(setup: Setup) -> int:
    """4 bytes an element of the adapter (`attach_adapter`); a fully trained base is counted under base."""
    return 0 if setup.full else 4 * setup.shape.num_trained


def optimizer_states(setup: Setup) -> int:
    """8 bytes a trained element for 32-bit Adam, 2 for 8-bit Adam."""
    return int(setup.optimizer_bytes * setup.shape.num_trained)


def gradients(setup: Setup) -> int:
    """4 bytes a trained element; twice under DistributedDataParallel, whose bucket is a second copy."""
    return 4 * setup.shape.num_trained * (2 if setup.world_size > 1 else 1)


def library_space(setup: Setup) -> int:
    """cuBLAS's own space: 32 MiB each for the forward pass, the backward pass's thread, and recorded graphs."""
    return _PRODUCT_SPACE * (3 if setup.graphs else 2)


# ---- what a forward pass keeps for the backward pass


def row_bytes(setup: Setup) -> int:
    """T H b: one layer's input."""
    return setup.tokens * setup.shape.hidden * setup.value_bytes


def kept_by_fast_layer(setup: Setup) -> int:
    """T ((3 H + A + 2 KV + 2 I + ranks) b + 4 heads): `recompute.saved_bytes`, by which the fast path goes itself."""
    assert setup.shape.parts is not None
    return saved_bytes(setup.shape.parts, setup.tokens, setup.group_ranks, setup.value_bytes)


def kept_by_stock_layer(setup: Setup) -> int:
    """With seven adapters, in half precision: T (28 H + 8 I + 14 r + 4 heads + 8), on 4 bit 8 H less.

    Of transformers' layer under peft and autocast: each norm keeps a float32 copy of its input (4 H); each adapter a
    half-precision copy of its own (6 H for q, k, v; 2 A for o; 4 H for gate and up; 2 I for down) and its projection
    (2 r), with dropout a mask of a byte too; q, k, v; attention's output; gate, silu(gate), up. Products that read the
    same tensor share it where nothing is cast or dropped: on a quantised base, or where the base itself is trained.
    Read from `LlamaDecoderLayer`, and peft's `lora.layer.Linear` and `lora.bnb.Linear4bit`.
    """
    shape, b, adapted = setup.shape, setup.value_bytes, [rank > 0 for rank in setup.shape.ranks]
    copies = [sum(adapted[:3]), adapted[3], sum(adapted[4:6]), adapted[6]]
    if setup.full or ((setup.bits or b == 4) and not shape.dropout):
        copies = [min(1, c or setup.full) for c in copies]
        copies[1] = 0  # o's input is attention's output
    inputs = (shape.hidden, _attended(shape), shape.hidden, shape.inner)
    read = sum(c * k for c, k in zip(copies, inputs, strict=True))
    masks = sum(on * k for on, k in zip(copies, inputs, strict=True)) if shape.dropout else 0
    norms = 2 * 4 * shape.hidden + 8 + (2 * b * shape.hidden if setup.full else 0)
    values = _qkv_width(shape) + _attended(shape) + 3 * shape.inner + read + sum(shape.ranks)
    return setup.tokens * (norms + values * b + masks + 4 * shape.heads)


def kept_activations(setup: Setup) -> int:
    """At the end of the forward pass: whole layers that are not computed again, of the others their input, T H b.

    Inputs of 256 MiB and more in all go to the host on the fast path; some are still on their way there.
    """
    again = setup.recomputed_layers
    whole = (setup.shape.num_layers - again) * kept_by_layer(setup)
    inputs = in_flight(setup) if setup.offloaded else again * row_bytes(setup)
    return whole + inputs + final_norm(setup)


def kept_by_layer(setup: Setup) -> int:
    """Of one layer on the path taken."""
    return kept_by_fast_layer(setup) if setup.on_fast_path else kept_by_stock_layer(setup)


def final_norm(setup: Setup) -> int:
    """The last norm's input, T H b, on the stock path in float32; angles of the rotary embedding, 4 T D."""
    own = row_bytes(setup) if setup.on_fast_path else 4 * setup.tokens * setup.shape.hidden
    return own + 4 * setup.tokens * setup.shape.head_size


def in_flight(setup: Setup) -> int:
    """On the way to or from the host: 2 T H b, for large batches also gate and up, 2 T I b (`HostOffload`)."""
    if not setup.offloaded:
        return 0
    deep = setup.tokens > MAX_GRAPH_TOKENS
    return row_bytes(setup) * 2 + (setup.tokens * 2 * setup.shape.inner * setup.value_bytes if deep else 0)


def cast_weights(setup: Setup) -> int:
    """Half-precision copies of trained weights, which autocast keeps through a forward pass; none on the fast path."""
    if setup.on_fast_path or setup.value_bytes == 4:
        return 0
    return setup.value_bytes * (
        setup.shape.num_linear + setup.shape.num_head if setup.full else setup.shape.num_trained
    )


# ---- what passes while a layer or the loss is computed


def layer_workspace(setup: Setup) -> int:
    """The most that a layer's backward pass has beside what was kept; weights as floats are most of it at small T."""
    return _fast_workspace(setup) if setup.on_fast_path else _stock_workspace(setup)


def _fast_workspace(setup: Setup) -> int:
    """The highest stage of `kernels.layer.layer_backward`: down's product, gate and up's, attention's, q, k and v's.

    A stage has its weight as floats with the ranks appended (`linear.Group`), one layer's at a time where least memory
    is asked for. The state between the halves is let go before attention; where it came back from the host, q, k, v and
    what attention made of them come only then.
    """
    shape, (r0, _, r2, r3) = setup.shape, setup.group_ranks
    h, inner, attended, qkv, tokens = shape.hidden, shape.inner, _attended(shape), _qkv_width(shape), setup.tokens
    slim = setup.recomputed_layers > 0 and setup.num_recomputed is None and tokens <= MAX_GRAPH_TOKENS
    r0, r2 = (0, 0) if shape.dropout else (r0, r2)  # under dropout the ranks are no part of the product
    later = qkv + attended if setup.offloaded and setup.num_recomputed is None and tokens > MAX_GRAPH_TOKENS else 0
    gone = 2 * inner + setup.group_ranks[2] + h  # gate and up, once their gradient has been used, and the state before
    down = tokens * (2 * h + r3 + inner - later) + (h + r3) * inner
    gate_up = tokens * (3 * h + r2 - later) + ((inner if slim else 2 * inner) + r2) * h
    after = tokens * (4 * h + r2 - later)
    attention = tokens * (2 * h + attended + qkv + 2 * attended - gone)  # the kernel sums dq in float32
    rotated = tokens * (2 * h + attended + 2 * qkv + r0 - gone)
    first = tokens * (4 * h + qkv + 2 * r0 - gone) + ((attended if slim else qkv) + r0) * h
    return max(down, gate_up, after, attention, rotated, first) * setup.value_bytes


def _stock_workspace(setup: Setup) -> int:
    """At down's product: T (2 H b + I (2 b + 4)), its input's gradients; on 4 bit 3 b, and the weight as floats."""
    shape, b = setup.shape, setup.value_bytes
    weight = 0 if setup.bits is None else shape.hidden * shape.inner * b
    return setup.tokens * (2 * shape.hidden * b + shape.inner * (2 * b + (b if setup.bits else 4))) + weight


def loss_workspace(setup: Setup) -> int:
    """A slice's logits, at most 256 MiB, and the last norm's output and its gradient, 2 T H b.

    Where only a share s of the tokens has a target, these are gathered and scattered: (2 + 2 s) T H b
    (`fused_linear_cross_entropy`). A float32 head is multiplied as a half-precision copy.
    """
    shape, b, share = setup.shape, setup.value_bytes, setup.target_share
    rows = slice_tokens_for(shape.vocabulary, b)
    logits = min(rows, int(setup.tokens * share) or 1) * shape.vocabulary * b
    hidden = (2 if share >= 1 else 2 + 2 * share) * row_bytes(setup)
    return int(hidden) + logits + (b * shape.num_head if setup.full and b < 4 else 0)


def graph_places(setup: Setup) -> int:
    """Beside recorded graphs (`LayerGraphs`): T H b (3 + 2 + 1 with checkpointing, else L + 2), a layer's gradients."""
    if not setup.graphs:
        return 0
    places = _PLACES + 3 if setup.recomputed_layers else setup.shape.num_layers + 2
    return places * row_bytes(setup) + 4 * setup.shape.num_trained // setup.shape.num_layers


def graph_pool(setup: Setup) -> int:
    """What recorded graphs hold for good, and torch counts only while recording: what a layer's passes take."""
    if not setup.graphs:
        return 0
    kept = 1 if setup.recomputed_layers else setup.shape.num_layers
    own = kept_by_layer(setup) - row_bytes(setup)  # inputs have their places
    return kept * own + layer_workspace(setup)


def _qkv_width(shape: ModelDims) -> int:
    return (shape.heads + 2 * shape.kv_heads) * shape.head_size


def _attended(shape: ModelDims) -> int:
    return shape.heads * shape.head_size
