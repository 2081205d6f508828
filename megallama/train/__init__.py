"""Training: one step (`trainer`), the loop around it (`loop`), pretraining, and `verify`, which proves a layout.

The command line imports each stage by its own name, so this face imports nothing.
"""
