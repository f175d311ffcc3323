"""What is learned, and in which order: the contracts in `experience`, and one file a stream family."""
