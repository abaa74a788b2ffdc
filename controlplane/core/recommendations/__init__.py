"""Recommendations to operators: when they are issued, what they predict, and how well they turned out."""
