"""Experts: what is known of each (spec), and how trained LoRA adapters are read (adapters)."""
