"""Classical import path: `xtuner.parallel.sequence.SequenceParallelSampler`."""
