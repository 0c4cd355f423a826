"""The processes in which stages run: the worker, and the supervisor that ends it and all that it started."""
