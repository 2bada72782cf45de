"""Migration and export."""
