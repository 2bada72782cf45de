"""Files, digests, locks and progress."""
