"""What a run leaves on the disk: its checkpoints, its config, its lock, and how a training goes on from them.

Modules of callbacks start with ``_``, so that ``--help`` does not offer what the command line adds by itself.
"""
