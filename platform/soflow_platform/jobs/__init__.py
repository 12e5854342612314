"""What a command does: targets, evaluate, compare, benchmark, prepare."""
