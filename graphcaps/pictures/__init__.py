"""Figures of layers and trained nets: numbers in inspection.py, drawn by figures.py."""
