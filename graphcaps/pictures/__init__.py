"""Figures of layers and trained nets: inspection.py computes the numbers, figures.py draws them."""
