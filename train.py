"""Train a character-level GRU on text: `python train.py --help`."""

from char_gru.rnn.process import train

if __name__ == "__main__":
    raise SystemExit(train())
