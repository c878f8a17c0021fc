"""Commands of ``peft-moe``, one file each."""
