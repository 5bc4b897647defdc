"""The ONNX graphs of a bundle, written by hand: the step network, its sampling tails, the tokenizer's two halves."""
