"""Applications of a tuned model: robot navigation, and medical images with experts (reference: paper, section 4)."""
