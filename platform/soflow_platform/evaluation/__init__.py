"""How a number is made: image sources, feature statistics, references, scoring protocol, evaluator."""
