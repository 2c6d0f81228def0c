"""Scores of a model's replies: what the captioning and question-answering papers report."""
