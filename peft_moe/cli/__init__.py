"""The face: the commands of ``peft-moe``, the terminal, and the embedded demo."""
