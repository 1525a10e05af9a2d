"""Tools that a model trained on MOSS's plugins may call: a calculator, an equation solver, a web search.

What a model writes is data: it is parsed by `arithmetic` and `equations`, never executed, and every tool has a bound on
time and on what it returns.
"""
