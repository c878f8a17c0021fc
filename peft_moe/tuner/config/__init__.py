"""``MoLoraConfig`` and the rules that its fields obey."""
