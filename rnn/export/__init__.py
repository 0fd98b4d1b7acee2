"""Models for other software, and models of other frameworks as checkpoints: `python -m rnn.export --help`."""
