"""TRL trainers that train the router."""
