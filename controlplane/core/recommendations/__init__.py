"""Recommendations to operators: when they are made, what effect they predict, and how they are scored."""
