# InternLM-20B, the base model. https://huggingface.co/internlm/internlm-20b
model = dict(path='internlm/internlm-20b', template='internlm_chat')
