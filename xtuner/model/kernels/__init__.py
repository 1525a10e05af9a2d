"""The pieces of a fast training step: each in plain PyTorch (`plain`) and, for CUDA, in Triton (`fused_*`).

Letters of shapes, in all files of this room: T tokens (rows of a flattened batch), H hidden size, I intermediate size,
K inputs and N outputs of a linear layer, R the ranks of a group's adapters together, r one rank, D one head's size,
V vocabulary.
"""
