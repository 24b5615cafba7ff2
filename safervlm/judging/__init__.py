"""From a response to a verdict: classifiers, rules, and the panel that assigns them."""
