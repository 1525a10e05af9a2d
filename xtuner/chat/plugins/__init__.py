"""Tools for models trained on MOSS's plugin data: a calculator, an equation solver, a web search.

Text written by a model is data: it is parsed by `formula` and `equations`, never executed. Every tool has limits on its
time and on the size of its result.
"""
