"""Peak memory of a training step on a GPU: the terms added up at each moment at which it may be highest."""

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
    graph_places,
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

__all__ = ['Prediction', 'Setup', 'moments', 'predict_memory']


def moments(setup: Setup) -> Mapping[str, Mapping[str, int]]:
    """What each moment of a step has beside what is there for the whole run, by term."""
    grads, layer = gradients(setup), kept_by_layer(setup)
    before = grads if setup.accumulated or setup.world_size > 1 else 0
    one = grads // setup.shape.num_layers
    kept, work = kept_activations(setup), layer_workspace(setup)
    anew = layer if setup.checkpointing and not setup.on_fast_path else cast_weights(setup)
    ends = {
        'the loss': {
            'gradients': before,
            'activations': kept + cast_weights(setup),
            'loss': loss_workspace(setup),
        },
        'the first layer of the backward pass': {
            'gradients': before + one,
            'activations': kept + anew,
            'workspace': work,
        },
        'the last layer of the backward pass': {
            'gradients': grads,
            'activations': layer + in_flight(setup) + row_bytes(setup) + cast_weights(setup) // setup.shape.num_layers,
            'workspace': work,
        },
        'the optimizer': {'gradients': grads, 'workspace': int(setup.optimizer_spare * setup.shape.num_trained)},
    }
    if setup.graphs:
        places, pool = graph_places(setup), graph_pool(setup)
        ends['recording CUDA graphs'] = {'gradients': before, 'activations': places, 'graphs': pool}
        ends['the end of a recorded backward pass'] = {'gradients': before + grads, 'activations': places}
    return ends


@dataclass(frozen=True)
class Prediction:
    """Peak memory of a training step on one GPU.

    Attributes:
        terms: Bytes that torch counts (`torch.cuda.max_memory_allocated`) at the highest moment, by term.
        beside: Bytes that are on the card and torch does not count.
        host: Bytes of pinned host memory.
        moment: When memory is highest.
    """

    terms: Mapping[str, int]
    beside: Mapping[str, int]
    host: Mapping[str, int]
    moment: str

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        return sum(self.terms.values())

    @property
    def on_card(self) -> int:
        """What the card must have free before the process begins."""
        return self.allocated + sum(self.beside.values())


def predict_memory(setup: Setup) -> Prediction:
    """Adds up the terms at each moment of a step and returns the highest."""
    run = {
        'base': base_weights(setup),
        'embedding': input_embedding(setup),
        'adapter': trained_weights(setup),
        'optimizer': 0 if setup.paged else optimizer_states(setup),
        'libraries': library_space(setup),
    }
    candidates = moments(setup)
    moment = max(candidates, key=lambda name: sum(candidates[name].values()))
    highest = sum(candidates[moment].values())
    beside = {'paged optimizer': optimizer_states(setup) if setup.paged else 0, 'CUDA': CONTEXT_BYTES}
    if setup.graphs:  # its memory is nobody else's, so what others need comes on top
        loss = sum(v for k, v in candidates['the loss'].items() if k != 'activations') + graph_places(setup)
        outside = max(loss, sum(candidates['the end of a recorded backward pass'].values()))
        beside['recorded graphs'] = max(0, graph_pool(setup) + outside - highest)
    beside['fragments'] = int(FRAGMENTS * (sum(run.values()) + highest))
    return Prediction(
        terms={k: v for k, v in {**run, **candidates[moment]}.items() if v},
        beside={k: v for k, v in beside.items() if v},
        host=host_memory(setup),
        moment=moment,
    )


def host_memory(setup: Setup) -> Mapping[str, int]:
    """Pinned: the input embedding; what layers put there, of large batches more than their inputs (`HostStore`)."""
    terms = {}
    if not input_embedding(setup):
        terms['embedding'] = setup.shape.num_embedding * 2
    inputs = setup.recomputed_layers * row_bytes(setup)
    if setup.offloaded:
        share = 2 + setup.shape.inner / setup.shape.hidden if setup.tokens > MAX_GRAPH_TOKENS else 1
        terms['activations'] = int(inputs * share)
    return terms
