"""Full fine-tuned models become LoRA experts: pairing of tensors, truncation by SVD, reports."""
