"""Run records: what a live run and a simulated run both write, and every report reads."""
