"""Terms of a training step's GPU memory as functions of sizes; `memory.predict` sums them.

Letters: T tokens of a micro-batch, H hidden, I inner, A = heads x D, V vocabulary, L layers, r rank, b bytes per value
in the compute dtype. A term is a function of `Setup` that returns bytes; its docstring gives the formula and its
source.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS
from xtuner.fused.loss import slice_tokens_for
from xtuner.fused.recompute import saved_bytes
from xtuner.memory.dims import ModelDims

_INPUT_BUFFERS = 3  # `cuda_graphs._RING_SIZE`: buffers for layer inputs besides recorded graphs
_OFFLOAD_FROM = 2**28  # `ActivationMemory.offload_from_bytes`
_BLOCK, _COARSE = 64, 256  # bitsandbytes: values per scale, scales per coarse scale
# cuBLAS keeps 32 MiB for each stream with products on compute capability 9.0, 8 MiB before; 9.0 is assumed.
_PRODUCT_SPACE = 2**25
# CUDA's context and library kernels, which torch does not count, and fragmentation of its allocator as a share of used
# memory; measured on an H100 (benchmarks/estimate_h100_2026-11-25.md).
CONTEXT_BYTES = 920 * 2**20
FRAGMENTS = 0.05


@dataclass(frozen=True)
class Setup:
    """Everything that the memory of a step depends on.

    Attributes:
        dims: The model and its adapter.
        tokens: T, tokens of a micro-batch on one device, including padding.
        longest: Tokens of a row.
        bits: Bits of a frozen weight of the blocks: 4 or 8; None if unquantized.
        double_quant: Whether the scales of 4-bit weights are quantized too.
        value_bytes: b.
        checkpointing: Whether activations are recomputed.
        num_recomputed: Recomputed layers on the fused path; None: all but the last if `checkpointing`, else 0.
        fast: Whether the fused path is requested.
        accumulated: Whether a step has several micro-batches, so that gradients exist during a forward pass.
        optimizer_bytes: Bytes of optimizer state per trained element.
        paged: Whether that state is in managed memory, which torch does not count and the driver may evict.
        optimizer_spare: Temporary bytes per trained element during the update.
        world_size: Number of devices.
        target_share: Share of tokens that are trained.
    """

    dims: ModelDims
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
        return self.dims.num_trained >= self.dims.num_base

    @property
    def on_fast_path(self) -> bool:
        """Whether the fused path is used."""
        return self.fast and not self.dims.unsupported_reason and self.bits != 8

    @property
    def recomputed_layers(self) -> int:
        """Number of layers that keep only their input and are recomputed."""
        if not self.on_fast_path:
            return self.dims.num_layers if self.checkpointing else 0
        if self.num_recomputed is not None:
            return self.num_recomputed
        return self.dims.num_layers - 1 if self.checkpointing else 0

    @property
    def graphs(self) -> bool:
        """Whether layers are recorded as CUDA graphs (`fused.cuda_graphs.suits`)."""
        return self.on_fast_path and self.tokens <= MAX_GRAPH_TOKENS and self.value_bytes == 2 and any(self.dims.ranks)

    @property
    def offloaded(self) -> bool:
        """Whether layer inputs are offloaded (`ActivationMemory.host_offload`); enough host memory is assumed."""
        return self.on_fast_path and self.recomputed_layers * row_bytes(self) >= _OFFLOAD_FROM

    @property
    def group_ranks(self) -> tuple[int, int, int, int]:
        """Summed ranks on q, k and v; o; gate and up; down."""
        q, k, v, o, gate, up, down = self.dims.ranks
        return q + k + v, o, gate + up, down


# ---- held for the whole run


def base_weights(setup: Setup) -> int:
    """All weights but the input embedding. 4 bit: NK / 2 + scales; head, norms and biases stay in the compute dtype.

    A scale for 64 values takes 4 bytes, quantized 1 + 4 / 256 (arXiv:2305.14314, section 3). 8 bit: NK + 4 N. Trained
    weights are float32 and counted as such here.
    """
    dims, size = setup.dims, 4 if setup.full else setup.value_bytes
    if setup.bits == 4:
        scale = 1 + 4 / _COARSE if setup.double_quant else 4
        linear = dims.num_linear * (0.5 + scale / _BLOCK)
    elif setup.bits == 8:
        linear = dims.num_linear + 4 * sum(n for n, _ in dims.linear)
    else:
        linear = dims.num_linear * size
    return int(linear) + (dims.num_head + dims.num_other) * size


def input_embedding(setup: Setup) -> int:
    """V H b; 0 on the fused path if frozen and untied, where it is on the host (`move_embedding_to_host`)."""
    size = 4 if setup.full else setup.value_bytes
    on_host = setup.on_fast_path and setup.dims.num_head and size == 2 and not setup.full
    return 0 if on_host else setup.dims.num_embedding * size


def trained_weights(setup: Setup) -> int:
    """4 bytes per element of the adapter (`attach_adapter`); a fully trained base counts under base."""
    return 0 if setup.full else 4 * setup.dims.num_trained


def optimizer_states(setup: Setup) -> int:
    """8 bytes per trained element for 32-bit Adam, 2 for 8-bit Adam."""
    return int(setup.optimizer_bytes * setup.dims.num_trained)


def gradients(setup: Setup) -> int:
    """4 bytes per trained element; twice under DistributedDataParallel, whose bucket is a second copy."""
    return 4 * setup.dims.num_trained * (2 if setup.world_size > 1 else 1)


def library_space(setup: Setup) -> int:
    """cuBLAS workspace: 32 MiB each for the forward pass, the backward thread, and recorded graphs."""
    return _PRODUCT_SPACE * (3 if setup.graphs else 2)


# ---- kept by the forward pass for the backward pass


def row_bytes(setup: Setup) -> int:
    """T H b: the input of one layer."""
    return setup.tokens * setup.dims.hidden * setup.value_bytes


def kept_by_fast_layer(setup: Setup) -> int:
    """T ((3 H + A + 2 KV + 2 I + ranks) b + 4 heads): `recompute.saved_bytes`, which the fused path itself uses."""
    assert setup.dims.parts is not None
    return saved_bytes(setup.dims.parts, setup.tokens, setup.group_ranks, setup.value_bytes)


def kept_by_stock_layer(setup: Setup) -> int:
    """With seven adapters, in half precision: T (28 H + 8 I + 14 r + 4 heads + 8), with 4 bit 8 H less.

    For transformers' layer under peft and autocast: each norm keeps a float32 copy of its input (4 H); each adapter a
    half-precision copy of its own (6 H for q, k, v; 2 A for o; 4 H for gate and up; 2 I for down) and its projection
    (2 r), with dropout also a mask of one byte; q, k, v; the attention output; gate, silu(gate), up. Products with the
    same input share it unless it is cast or dropped: with a quantized base, or if the base itself is trained. Derived
    from `LlamaDecoderLayer`, and peft's `lora.layer.Linear` and `lora.bnb.Linear4bit`.
    """
    dims, b, adapted = setup.dims, setup.value_bytes, [rank > 0 for rank in setup.dims.ranks]
    copies = [sum(adapted[:3]), adapted[3], sum(adapted[4:6]), adapted[6]]
    if setup.full or ((setup.bits or b == 4) and not dims.dropout):
        copies = [min(1, c or setup.full) for c in copies]
        copies[1] = 0  # o's input is the attention output
    inputs = (dims.hidden, _attended(dims), dims.hidden, dims.inner)
    read = sum(c * k for c, k in zip(copies, inputs, strict=True))
    masks = sum(on * k for on, k in zip(copies, inputs, strict=True)) if dims.dropout else 0
    norms = 2 * 4 * dims.hidden + 8 + (2 * b * dims.hidden if setup.full else 0)
    values = _qkv_width(dims) + _attended(dims) + 3 * dims.inner + read + sum(dims.ranks)
    return setup.tokens * (norms + values * b + masks + 4 * dims.heads)


def kept_activations(setup: Setup) -> int:
    """At the end of the forward pass: complete layers that are not recomputed, and the inputs, T H b, of the others.

    On the fused path inputs of 256 MiB or more in total are offloaded; some of them are still in flight.
    """
    recomputed = setup.recomputed_layers
    whole = (setup.dims.num_layers - recomputed) * kept_by_layer(setup)
    inputs = in_flight(setup) if setup.offloaded else recomputed * row_bytes(setup)
    return whole + inputs + final_norm(setup)


def kept_by_layer(setup: Setup) -> int:
    """Kept by one layer on the path in use."""
    return kept_by_fast_layer(setup) if setup.on_fast_path else kept_by_stock_layer(setup)


def final_norm(setup: Setup) -> int:
    """The last norm's input, T H b, in float32 off the fused path; RoPE angles, 4 T D."""
    norm_input = row_bytes(setup) if setup.on_fast_path else 4 * setup.tokens * setup.dims.hidden
    return norm_input + 4 * setup.tokens * setup.dims.head_size


def in_flight(setup: Setup) -> int:
    """In transfer to or from the host: 2 T H b, for large batches also gate and up, 2 T I b (`HostOffload`)."""
    if not setup.offloaded:
        return 0
    deep = setup.tokens > MAX_GRAPH_TOKENS
    return row_bytes(setup) * 2 + (setup.tokens * 2 * setup.dims.inner * setup.value_bytes if deep else 0)


def cast_weights(setup: Setup) -> int:
    """Half-precision copies of trained weights, which autocast keeps through a forward pass; none on the fused path."""
    if setup.on_fast_path or setup.value_bytes == 4:
        return 0
    return setup.value_bytes * (setup.dims.num_linear + setup.dims.num_head if setup.full else setup.dims.num_trained)


# ---- temporary memory of a layer or the loss


def layer_workspace(setup: Setup) -> int:
    """Peak temporary memory of a layer's backward pass; for small T mostly dequantized weights."""
    return _fast_workspace(setup) if setup.on_fast_path else _stock_workspace(setup)


def _fast_workspace(setup: Setup) -> int:
    """The peak stage of `fused.layer.layer_backward`: the products of down, gate and up, attention, or q, k and v.

    A stage has its weight as floats with the ranks appended (`linear.Group`), one layer's at a time in low-memory mode.
    The state between the halves is freed before attention; if it was offloaded, q, k, v and the attention output are
    reloaded only then.
    """
    dims, (r0, _, r2, r3) = setup.dims, setup.group_ranks
    h, inner, attended, qkv, tokens = dims.hidden, dims.inner, _attended(dims), _qkv_width(dims), setup.tokens
    low_memory = setup.recomputed_layers > 0 and setup.num_recomputed is None and tokens <= MAX_GRAPH_TOKENS
    r0, r2 = (0, 0) if dims.dropout else (r0, r2)  # with dropout the ranks are not part of the product
    reloaded = qkv + attended if setup.offloaded and setup.num_recomputed is None and tokens > MAX_GRAPH_TOKENS else 0
    freed = 2 * inner + setup.group_ranks[2] + h  # gate and up after their gradient was used, and the earlier state
    down = tokens * (2 * h + r3 + inner - reloaded) + (h + r3) * inner
    gate_up = tokens * (3 * h + r2 - reloaded) + ((inner if low_memory else 2 * inner) + r2) * h
    after = tokens * (4 * h + r2 - reloaded)
    attention = tokens * (2 * h + attended + qkv + 2 * attended - freed)  # the kernel sums dq in float32
    rotated = tokens * (2 * h + attended + 2 * qkv + r0 - freed)
    first = tokens * (4 * h + qkv + 2 * r0 - freed) + ((attended if low_memory else qkv) + r0) * h
    return max(down, gate_up, after, attention, rotated, first) * setup.value_bytes


def _stock_workspace(setup: Setup) -> int:
    """At down's product: T (2 H b + I (2 b + 4)), its input's gradients; with 4 bit 3 b, and the dequantized weight."""
    dims, b = setup.dims, setup.value_bytes
    weight = 0 if setup.bits is None else dims.hidden * dims.inner * b
    return setup.tokens * (2 * dims.hidden * b + dims.inner * (2 * b + (b if setup.bits else 4))) + weight


def loss_workspace(setup: Setup) -> int:
    """Logits of a slice, at most 256 MiB, and the last norm's output and its gradient, 2 T H b.

    If only a share s of the tokens has a target, these are gathered and scattered: (2 + 2 s) T H b
    (`fused_linear_cross_entropy`). A float32 head is multiplied as a half-precision copy.
    """
    dims, b, share = setup.dims, setup.value_bytes, setup.target_share
    rows = slice_tokens_for(dims.vocabulary, b)
    logits = min(rows, int(setup.tokens * share) or 1) * dims.vocabulary * b
    hidden = (2 if share >= 1 else 2 + 2 * share) * row_bytes(setup)
    return int(hidden) + logits + (b * dims.num_head if setup.full and b < 4 else 0)


def graph_buffers(setup: Setup) -> int:
    """Besides recorded graphs (`LayerGraphs`): T H b (3 + 2 + 1 with checkpointing, else L + 2), layer gradients."""
    if not setup.graphs:
        return 0
    buffers = _INPUT_BUFFERS + 3 if setup.recomputed_layers else setup.dims.num_layers + 2
    return buffers * row_bytes(setup) + 4 * setup.dims.num_trained // setup.dims.num_layers


def graph_pool(setup: Setup) -> int:
    """Memory that recorded graphs hold permanently, which torch counts only while recording: a layer's passes."""
    if not setup.graphs:
        return 0
    kept = 1 if setup.recomputed_layers else setup.dims.num_layers
    without_input = kept_by_layer(setup) - row_bytes(setup)  # inputs have their own buffers
    return kept * without_input + layer_workspace(setup)


def _qkv_width(dims: ModelDims) -> int:
    return (dims.heads + 2 * dims.kv_heads) * dims.head_size


def _attended(dims: ModelDims) -> int:
    return dims.heads * dims.head_size
