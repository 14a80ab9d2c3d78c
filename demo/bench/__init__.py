"""The benchmark: every method on the same prompts, seeds and noise, in one process. ``python dev.py bench`` runs it.

``methods`` says what is compared, ``rivals`` re-states what the host does not have, ``runner`` samples and measures,
``figures`` holds the statistics, and ``page`` turns docs/benchmarks.json into docs/benchmarks.md and its plots. ``latency``,
``tails``, ``real_size``, ``adaptive`` and ``ablation`` are measurements of their own.
"""
