"""Networks that are trained already, given weights of their own and more blocks."""
