"""Feature networks, metrics, and the protocol that a number was measured by."""
