"""Write text with a trained model: `python generate.py --help`."""

from char_gru.rnn.process import generate

if __name__ == "__main__":
    raise SystemExit(generate())
