# InternLM3-8B-Instruct. https://huggingface.co/internlm/internlm3-8b-instruct
model = dict(path='internlm/internlm3-8b-instruct', template='internlm2_chat')
