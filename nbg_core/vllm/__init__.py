"""vLLM servers, which run in an environment of their own, and their client: HTTP requests that carry token ids."""
