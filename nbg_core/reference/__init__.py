"""Asset `reference_logprobs`, table `reference_logprobs`: the frozen reference's log-probs of the same tokens."""
