# Seed, memory, checkpoints, logs and the two questions that are answered along the way.
runtime = dict(seed=42, activation_checkpointing='auto')
checkpoint = dict(interval=100, max_keep=2)
log = dict(interval=1, trackers=['tensorboard'])
samples = dict(
    prompts=['请给我介绍五个上海的景点', 'Please tell me five scenic spots in Shanghai'],
    interval=100,
)
