"""What is recorded of a run: metadata, sessions, the report, the model card."""
