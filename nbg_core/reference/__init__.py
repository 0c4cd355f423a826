"""Asset `reference_logprobs`, table `reference_logprobs`: the frozen reference's log-probabilities of the responses in
pairs, and how far the sampler's are from them."""
