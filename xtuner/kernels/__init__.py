"""Kernels of the fused path: each in plain PyTorch (`reference`) and, for CUDA, in Triton (`triton/`).

Shape letters in this package: T tokens (rows of a flattened batch), H hidden size, I intermediate size, K inputs and N
outputs of a linear layer, R summed rank of the adapters of a group, r rank of one adapter, D head size, V vocabulary.
"""
