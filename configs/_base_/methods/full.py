# Full fine-tuning: all weights are trained, in float32 under autocast.
quantization = None
adapter = None
