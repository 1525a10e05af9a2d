# InternLM-Chat-20B, fine-tuned for dialogue. https://huggingface.co/internlm/internlm-chat-20b
model = dict(path='internlm/internlm-chat-20b', template='internlm_chat')
