"""Laws of weights through depth, and what trained weights say of theirs."""
