"""The PEFT method: its config, its layers, how it is saved, and the model that injects it."""
