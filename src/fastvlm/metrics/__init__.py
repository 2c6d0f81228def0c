"""Scores of replies, as the published evaluations compute them."""
