"""The light commands, one file each; files with a leading underscore hold what they share."""
