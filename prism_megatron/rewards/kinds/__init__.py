"""One file for each kind of answer; ``rewards/check.py`` chooses by the gold. docs/rewards.md has the rules."""
