# Every weight is trained, in float32 under autocast.
quantization = None
adapter = None
