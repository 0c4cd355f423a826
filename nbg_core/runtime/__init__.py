"""The processes in which stages run: the worker, and the supervisor, which makes sure that none of them is left."""
