# Seed, memory, checkpoints and logs. Along the way, the first prompts of the training data are answered.
runtime = dict(seed=42, activation_checkpointing='auto')
checkpoint = dict(interval=100, max_keep=2)
log = dict(interval=1, trackers=['tensorboard'])
samples = dict(interval=100)
