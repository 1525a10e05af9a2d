# InternLM2-20B, the base model. https://huggingface.co/internlm/internlm2-20b
model = dict(path='internlm/internlm2-20b', template='internlm2_chat')
