"""Calls that can be run again: what they were given, what they saw, and what autograd saved of them."""
