# Three epochs at the QLoRA paper's learning rate, 32-bit paged AdamW (its state moves to the host if needed).
from bitsandbytes.optim import PagedAdamW32bit

optimizer = dict(type=PagedAdamW32bit, lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0)
schedule = dict(
    max_epochs=3,
    batch_size=1,
    accumulative_counts=16,
    warmup_ratio=0.03,
    decay='cosine',
    max_norm=1.0,
)
