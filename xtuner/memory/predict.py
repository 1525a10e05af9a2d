"""Predicts the peak GPU memory of a training step: sums the terms at each phase in which it may peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS
from xtuner.memory.terms import (
    CONTEXT_BYTES,
    FRAGMENTS,
    Setup,
    base_weights,
    cast_weights,
    gradients,
    graph_buffers,
    graph_pool,
    in_flight,
    input_embedding,
    kept_activations,
    kept_by_layer,
    layer_workspace,
    library_space,
    loss_workspace,
    optimizer_states,
    row_bytes,
    trained_weights,
)

__all__ = ['Prediction', 'Setup', 'phase_memory', 'predict_memory']


def phase_memory(setup: Setup) -> Mapping[str, Mapping[str, int]]:
    """Transient memory at each phase of a step, by component, in bytes."""
    grads, layer = gradients(setup), kept_by_layer(setup)
    before = grads if setup.accumulated or setup.world_size > 1 else 0
    one = grads // setup.dims.num_layers
    kept, work = kept_activations(setup), layer_workspace(setup)
    recomputed = layer if setup.checkpointing and not setup.on_fast_path else cast_weights(setup)
    phases = {
        'the loss': {
            'gradients': before,
            'activations': kept + cast_weights(setup),
            'loss': loss_workspace(setup),
        },
        'the first layer of the backward pass': {
            'gradients': before + one,
            'activations': kept + recomputed,
            'workspace': work,
        },
        'the last layer of the backward pass': {
            'gradients': grads,
            'activations': layer + in_flight(setup) + row_bytes(setup) + cast_weights(setup) // setup.dims.num_layers,
            'workspace': work,
        },
        'the optimizer': {'gradients': grads, 'workspace': int(setup.optimizer_spare * setup.dims.num_trained)},
    }
    if setup.graphs:
        buffers, pool = graph_buffers(setup), graph_pool(setup)
        phases['recording CUDA graphs'] = {'gradients': before, 'activations': buffers, 'graphs': pool}
        phases['the end of a recorded backward pass'] = {'gradients': before + grads, 'activations': buffers}
    return phases


@dataclass(frozen=True)
class Prediction:
    """Peak memory of a training step on one GPU.

    Attributes:
        terms: Bytes that torch counts (`torch.cuda.max_memory_allocated`) at the peak, by term.
        untracked: Bytes on the GPU that torch does not count.
        host: Bytes of pinned host memory.
        phase: The phase with the peak.
    """

    terms: Mapping[str, int]
    untracked: Mapping[str, int]
    host: Mapping[str, int]
    phase: str

    @property
    def allocated(self) -> int:
        """Predicted `torch.cuda.max_memory_allocated`."""
        return sum(self.terms.values())

    @property
    def on_gpu(self) -> int:
        """Free GPU memory that the process needs when it starts."""
        return self.allocated + sum(self.untracked.values())


def predict_memory(setup: Setup) -> Prediction:
    """Sums the terms at each phase of a step and returns the peak."""
    run = {
        'base': base_weights(setup),
        'embedding': input_embedding(setup),
        'adapter': trained_weights(setup),
        'optimizer': 0 if setup.paged else optimizer_states(setup),
        'libraries': library_space(setup),
    }
    phases = phase_memory(setup)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    highest = sum(phases[phase].values())
    untracked = {'paged optimizer': optimizer_states(setup) if setup.paged else 0, 'CUDA': CONTEXT_BYTES}
    if setup.graphs:  # the graphs' private pool cannot be reused, so other needs are added
        loss = sum(v for k, v in phases['the loss'].items() if k != 'activations') + graph_buffers(setup)
        outside = max(loss, sum(phases['the end of a recorded backward pass'].values()))
        untracked['recorded graphs'] = max(0, graph_pool(setup) + outside - highest)
    untracked['fragments'] = int(FRAGMENTS * (sum(run.values()) + highest))
    return Prediction(
        terms={k: v for k, v in {**run, **phases[phase]}.items() if v},
        untracked={k: v for k, v in untracked.items() if v},
        host=host_memory(setup),
        phase=phase,
    )


def host_memory(setup: Setup) -> Mapping[str, int]:
    """Pinned host memory: the input embedding, and offloaded activations (`HostOffload`)."""
    terms = {}
    if not input_embedding(setup):
        terms['embedding'] = setup.dims.num_embedding * 2
    inputs = setup.recomputed_layers * row_bytes(setup)
    if setup.offloaded:
        share = 2 + setup.dims.inner / setup.dims.hidden if setup.tokens > MAX_GRAPH_TOKENS else 1
        terms['activations'] = int(inputs * share)
    return terms
