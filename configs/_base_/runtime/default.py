# Seed, memory, checkpoints, logs, and samples: answers to the first prompts of the training data.
runtime = dict(seed=42, activation_checkpointing='auto')
checkpoint = dict(interval=100, max_keep=2)
log = dict(interval=1, trackers=['tensorboard'])
samples = dict(interval=100)
