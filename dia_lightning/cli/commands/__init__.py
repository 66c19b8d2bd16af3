"""The light commands, a file for each; what they share is in files whose names start with an underscore."""
