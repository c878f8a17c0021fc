"""One forward pass: its call, its context, its decisions, and the KV cache that carries them."""
