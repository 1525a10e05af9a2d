# OpenAssistant conversations, guanaco's selection. https://huggingface.co/datasets/timdettmers/openassistant-guanaco
dataset = dict(source='timdettmers/openassistant-guanaco', map_fn='oasst1', max_length=2048)
