"""Callbacks: weights (EMA, export), losses per state, pictures, quality. Any order in the list is right."""
