"""What several tests share: tiny bases, real adapters for them, batches, and routers set to known weights."""
