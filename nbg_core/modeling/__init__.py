"""Models from folders to hidden states and log-probabilities: loading, chat templates, packed and padded forward
passes, sequence parallelism, and the output matrix (`lm_head`)."""
