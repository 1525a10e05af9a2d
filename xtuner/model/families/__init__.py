"""What is particular to a family of models: one file or folder each."""
