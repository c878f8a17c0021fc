"""TRL's trainers for mixtures, and what they add to a training step."""
