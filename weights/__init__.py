"""Published weights: what they are, what they were trained on, and where they come from."""
