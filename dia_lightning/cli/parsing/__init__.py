"""From what was typed to values: the parser, what it refuses, and what its errors say."""
