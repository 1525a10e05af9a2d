# MOSS-003 dialogues, a file to download first. https://huggingface.co/datasets/fnlp/moss-003-sft-data
dataset = dict(source='data/moss-003-sft-no-tools.jsonl', map_fn='moss_003_sft', max_length=2048)
