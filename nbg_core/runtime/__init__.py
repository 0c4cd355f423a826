"""The processes that stages run in: the worker, and the supervisor that leaves none of them behind."""
