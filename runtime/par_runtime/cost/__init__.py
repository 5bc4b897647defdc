"""What a model costs, counted and not measured: bytes and operations of its calls, memory, and the least time."""
