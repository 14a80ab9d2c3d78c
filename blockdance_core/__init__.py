"""BlockDance: reuse of structurally similar features in diffusion transformers.

Read `interception.py` first: it is the core idea. Source: H. Zhang et al., "BlockDance", CVPR 2025, arXiv 2503.15927.
"""
