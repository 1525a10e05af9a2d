"""The demo: trains, fine-tunes, merges and queries a tiny InternLM on the CPU. `make demo` runs demo.py."""
