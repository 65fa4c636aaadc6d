"""TensorBoard that shows whether mining works."""
