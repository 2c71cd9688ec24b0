"""What a run needs before anything is started: memory, time, traffic and disk, and the layouts that fit."""
