# InternLM-Chat-7B for 8,192 tokens. https://huggingface.co/internlm/internlm-chat-7b-8k
model = dict(path='internlm/internlm-chat-7b-8k', template='internlm_chat')
