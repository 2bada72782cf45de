"""Helpers for users' own scripts."""
