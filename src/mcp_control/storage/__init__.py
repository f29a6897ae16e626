"""Where things are kept: the ports in `ports.py`, an adapter per folder. Components see the ports alone."""
