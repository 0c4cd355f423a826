"""Models, from folders to hidden states and log-probabilities: loading, chat templates, packed and padded forward
passes, sequence parallelism, and the LM head (`lm_head`). The *output matrix* is the LM head's weight [V, H]."""
