"""Images, figures and TensorBoard summaries."""
