"""Training data: balanced batches, augmentation, domain labels."""
