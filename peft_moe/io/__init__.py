"""Files, and nothing but files: atomic folders, strict JSON and YAML, adapters, checkpoints, texts."""
