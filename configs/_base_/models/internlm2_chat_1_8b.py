# InternLM2-Chat-1.8B, fine-tuned for dialogue. https://huggingface.co/internlm/internlm2-chat-1_8b
model = dict(path='internlm/internlm2-chat-1_8b', template='internlm2_chat')
