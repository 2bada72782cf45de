"""Run folders, checkpoints, tracking, signals."""
