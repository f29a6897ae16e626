"""Plugins: what others add to the product, through the hooks in `hookspecs.py`."""
