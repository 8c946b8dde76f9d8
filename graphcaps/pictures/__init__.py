"""What a layer or a trained net shows: its numbers in inspection.py, drawn by figures.py."""
