"""Adapters: attach, save, load, and the change that they make to a weight."""
