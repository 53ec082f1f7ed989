"""Many runs of one experiment: what to try, what came of it, and what to try next."""
