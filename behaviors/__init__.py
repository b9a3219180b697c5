"""How to act in a world model, and how that is learned."""
