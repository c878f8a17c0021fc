"""The command line ``peft-moe``: its commands, one file per subject, and the embedded demo."""
