"""Sweeps: many runs of one config with some fields varied, on Ray Tune. `tune/sweep.py` is the way in."""
