# InternLM2.5-7B-Chat. https://huggingface.co/internlm/internlm2_5-7b-chat
model = dict(path='internlm/internlm2_5-7b-chat', template='internlm2_chat')
