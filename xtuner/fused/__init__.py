"""The fused training path: another forward and backward pass over the modules of a model.

Shape letters in all files of the package: T tokens (rows of a flattened batch), H hidden size, I intermediate size,
K inputs and N outputs of a linear layer, R the ranks of a group's adapters together, r one rank, D head size,
V vocabulary.
"""
