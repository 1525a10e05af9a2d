# Open-Platypus, reasoning tasks in the Alpaca format. https://huggingface.co/datasets/garage-bAInd/Open-Platypus
dataset = dict(source='garage-bAInd/Open-Platypus', map_fn='alpaca', max_length=2048)
