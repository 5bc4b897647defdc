"""What a model costs, counted and not measured: the bytes and operations of its calls, its memory, and the least time."""
