# InternLM2-Chat-20B, fine-tuned for dialogue. https://huggingface.co/internlm/internlm2-chat-20b
model = dict(path='internlm/internlm2-chat-20b', template='internlm2_chat')
