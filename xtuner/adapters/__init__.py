"""Adapters: attaching, saving and loading them, and the change that they make to a weight."""
