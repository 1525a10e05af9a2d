# InternLM2-Chat-7B, fine-tuned for dialogue. https://huggingface.co/internlm/internlm2-chat-7b
model = dict(path='internlm/internlm2-chat-7b', template='internlm2_chat')
