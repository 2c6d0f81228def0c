"""Programs that hold a model in one engine each, and run in its environment."""
