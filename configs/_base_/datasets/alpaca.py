# Instructions of Stanford Alpaca. https://huggingface.co/datasets/tatsu-lab/alpaca
dataset = dict(source='tatsu-lab/alpaca', map_fn='alpaca', max_length=2048)
