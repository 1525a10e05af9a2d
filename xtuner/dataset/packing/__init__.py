"""Groups samples into packs and batches and orders them for an epoch."""
