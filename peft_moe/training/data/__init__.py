"""Training data: domain labels, balanced sampling of domains, augmentation."""
