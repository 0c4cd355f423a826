"""Scorers, which give a response a number, and verifiers, which check an answer by a rule."""
