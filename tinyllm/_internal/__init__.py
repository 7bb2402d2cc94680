"""Support that is no one's business but the package's own: files, locks, signals, memory, words for messages."""
