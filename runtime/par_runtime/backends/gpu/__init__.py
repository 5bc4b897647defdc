"""What engines on a GPU share, whoever made them: tables of inputs, memory, capture, whole images."""
