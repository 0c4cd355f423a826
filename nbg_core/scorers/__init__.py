"""What gives one response a number: the table of scorers, and the verifiers that check an answer by a rule."""
