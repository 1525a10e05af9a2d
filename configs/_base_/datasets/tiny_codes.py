# Short programs, explained. https://huggingface.co/datasets/nampdn-ai/tiny-codes
dataset = dict(source='nampdn-ai/tiny-codes', map_fn='tiny_codes', max_length=2048)
