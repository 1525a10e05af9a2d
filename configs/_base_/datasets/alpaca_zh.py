# Alpaca instructions in Chinese, answered by GPT-4. https://huggingface.co/datasets/silk-road/alpaca-data-gpt4-chinese
dataset = dict(source='silk-road/alpaca-data-gpt4-chinese', map_fn='alpaca_zh', max_length=2048)
