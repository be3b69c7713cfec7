"""Many runs for one question: sweeps, and the protocol over its subjects."""
