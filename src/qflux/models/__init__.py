"""Loading, adapters, optimizers."""
