"""Configs: lookup, loading, checks and flattening."""
