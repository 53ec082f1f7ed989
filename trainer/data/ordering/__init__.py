"""Order of samples: position to sample and back, mixtures, draws by weight, exclusions, trace."""
