"""Generated inputs for everything that takes something from outside, and for the policies.

``python -m tests.fuzz --examples 1000000 --seed 1`` shares the inputs out over the targets and
prints how many were taken, refused and failed. Each input has a seed of its own, which is printed
when it fails: ``--target NAME --only INDEX`` with the same ``--seed`` runs that one again.
"""
