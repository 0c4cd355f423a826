"""vLLM servers, in an environment of their own, spoken to over HTTP with token ids."""
