"""The fused training path: a fused forward and backward pass over the modules of a model.

Shape letters in all modules of the package: T tokens (rows of the flattened batch), H hidden size, I intermediate size,
K inputs and N outputs of a linear layer, R ranks of all adapters of a group together, r rank of one adapter,
D head size, V vocabulary size.
"""
