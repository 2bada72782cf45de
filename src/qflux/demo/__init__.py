"""The tiny pretrained model and its data."""
