"""Several processes: how they start, what they tell each other, and how they stop."""
