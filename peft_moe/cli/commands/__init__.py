"""The commands of ``peft-moe``, one file per subject."""
