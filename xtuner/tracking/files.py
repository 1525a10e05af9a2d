"""Names of the files in a work folder that a run writes and the report reads."""

METRICS_FILE = 'metrics.jsonl'  # one line per step
SAMPLES_FILE = 'samples.jsonl'  # one line for each evaluated step
