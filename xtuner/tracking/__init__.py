"""Records of a run: metadata, sessions, the report and the model card."""
