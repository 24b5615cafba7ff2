"""Judging of responses: classifiers, rules, ratings, and the panel that selects among them."""
