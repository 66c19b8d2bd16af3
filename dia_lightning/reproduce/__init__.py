"""Comparisons that can be repeated: arms trained over seeds, each run a process, and the table of their results."""

from dia_lightning._extras import require

require("jsonargparse", by=__name__)
