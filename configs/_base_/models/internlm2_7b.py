# InternLM2-7B, the base model. https://huggingface.co/internlm/internlm2-7b
model = dict(path='internlm/internlm2-7b', template='internlm2_chat')
