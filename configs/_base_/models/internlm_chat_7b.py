# InternLM-Chat-7B, fine-tuned for dialogue. https://huggingface.co/internlm/internlm-chat-7b
model = dict(path='internlm/internlm-chat-7b', template='internlm_chat')
