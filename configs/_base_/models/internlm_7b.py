# InternLM-7B, the base model. https://huggingface.co/internlm/internlm-7b
model = dict(path='internlm/internlm-7b', template='internlm_chat')
