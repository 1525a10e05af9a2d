"""The embedded default: a tiny InternLM made, tuned, merged and asked on the CPU. `make demo` runs demo.py."""
