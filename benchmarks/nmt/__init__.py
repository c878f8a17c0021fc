"""The claims of Chirkova et al. (arXiv 2407.01126) about multi-domain translation, on a small scale."""
