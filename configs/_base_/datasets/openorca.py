# OpenOrca, four million explained answers. https://huggingface.co/datasets/Open-Orca/OpenOrca
dataset = dict(source='Open-Orca/OpenOrca', map_fn='openorca', max_length=2048)
