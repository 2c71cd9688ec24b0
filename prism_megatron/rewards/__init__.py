"""What an answer is worth: its form, and whether it is right. Model output is hostile here. Imports no torch."""
