"""The runners of branches: one by one, compiled, or as captured graphs.

They decide how a branch is run; the models decide what it computes.
"""
