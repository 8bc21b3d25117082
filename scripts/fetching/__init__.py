"""The parts of scripts/fetch_data.py: where each data set comes from, and what it must hold."""
