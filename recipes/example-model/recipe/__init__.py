"""How the example model was made: its encoder, its stages, its rewards."""
