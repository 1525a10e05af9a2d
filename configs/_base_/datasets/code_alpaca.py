# Twenty thousand programming tasks. https://huggingface.co/datasets/HuggingFaceH4/CodeAlpaca_20K
dataset = dict(source='HuggingFaceH4/CodeAlpaca_20K', map_fn='code_alpaca', max_length=2048)
