"""Fuzzing: whatever a user gives fastvlm, the result is right or one clear sentence."""
