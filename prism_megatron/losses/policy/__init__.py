"""What a policy maximises: surrogates of the published algorithms, divergences, corrections, and means over a step."""
