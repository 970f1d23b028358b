"""Router-R1: a policy that asks a pool of language models, and learns which to ask.

Zhang, Feng, You 2025, arXiv:2506.09033; docs/recipes/router_r1.md is the recipe's page.
"""
