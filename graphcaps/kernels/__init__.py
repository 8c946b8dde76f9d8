"""Poses, matrices and a graph enter, routed capsules leave; votes and logits are never stored."""
