"""The measuring harness: speed, quality, memory and start-up beside other engines.

Scripts, each run from the repository's root as `python -m perf.NAME` (`--help` tells the options): decode, quality,
agree, start, growth, busy, kernels, profile, report; and synthetic, which makes large models with random weights for
them. They need the `bench` extra; a peer that is not installed is reported as absent. Not part of
the package.
"""
