"""Callbacks: weights (EMA, export), losses per state, pictures, quality. Their order in the list does not matter."""
