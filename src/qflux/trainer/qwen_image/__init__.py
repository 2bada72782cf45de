"""What the three families around one network share: its components, its call, and data of the real models."""
