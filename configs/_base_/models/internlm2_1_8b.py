# InternLM2-1.8B, the base model. https://huggingface.co/internlm/internlm2-1_8b
model = dict(path='internlm/internlm2-1_8b', template='internlm2_chat')
